"""Settings of a training run about its pictures: photos, prompts, and those that keep the class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svft_diffusion.data.captions import CAPTION_SOURCES
from svft_diffusion.data.cutting import INTERPOLATIONS
from svft_diffusion.settings import setting

_DATA = "pictures and prompts"
_PRIOR = "prior preservation"


@dataclass(frozen=True)
class PictureSettings:
    """The part of `TrainingConfig` that says what is learned; `check_data_settings` says whether it fits together."""

    instance_data_dir: Path | None = setting(None, "folder with the photos of the subject (required)", group=_DATA)
    instance_prompt: str | None = setting(
        None, "prompt of the photos, with a rare word for the subject: 'a photo of sks dog' (required)", group=_DATA
    )
    concepts_list: Path | None = setting(
        None, "several subjects: JSON or YAML list of instance_prompt, instance_data_dir, class_prompt, class_data_dir",
        group=_DATA,
    )  # fmt: skip
    caption_source: str = setting(
        "none",
        "whole prompts of photos, --instance_prompt for those without; txt: NAME.txt beside a photo; metadata: "
        "metadata.jsonl, with file_name and text in each line",
        group=_DATA,
        choices=CAPTION_SOURCES,
    )
    caption_dropout: float = setting(
        0.0, "part of the photos' turns with an empty prompt; it keeps what guidance is measured against", group=_DATA
    )
    resolution: int | None = setting(None, "side of the training squares in pixels (default: the base's)", group=_DATA)
    aspect_ratio_buckets: str | None = setting(
        None, "shapes instead of squares: 'height,width;height,width', or auto", group=_DATA
    )
    center_crop: bool = setting(False, "cut the middle of a photo, not a random place", group=_DATA)
    random_flip: bool = setting(False, "mirror half of what is seen of each photo; not for lettering", group=_DATA)
    image_interpolation_mode: str = setting(
        "lanczos", "how photos are resized", group=_DATA, choices=tuple(INTERPOLATIONS)
    )
    masked_loss: bool = setting(
        False, "learn the subject alone: white in NAME.mask.png beside a photo, else what is opaque", group=_DATA
    )
    unmasked_weight: float = setting(0.1, "weight of the rest with --masked_loss", group=_DATA)

    with_prior_preservation: bool = setting(
        False, "train on pictures of the class beside the photos, so that the class is not forgotten", group=_PRIOR
    )
    prior_source: str = setting(
        "images",
        "images: class pictures; base: what the base model predicts for the photos with --class_prompt, no pictures",
        group=_PRIOR,
        choices=("images", "base"),
    )
    class_data_dir: Path | None = setting(None, "folder of class pictures; filled up by the base model", group=_PRIOR)
    class_prompt: str | None = setting(None, "prompt of the class pictures: 'a photo of a dog'", group=_PRIOR)
    class_prompts_file: Path | None = setting(
        None,
        "text file, one prompt a line, taken in turn for the class pictures, each of which trains with its own: "
        "varied scenes here keep the model's scenes intact",
        group=_PRIOR,
    )
    prior_loss_weight: float = setting(1.0, "weight of the class pictures' loss", group=_PRIOR)
    num_class_images: int = setting(100, "class pictures; missing ones are drawn by the base model", group=_PRIOR)
    sample_batch_size: int = setting(4, "class pictures drawn at once", group=_PRIOR)
    prior_generation_num_inference_steps: int = setting(25, "denoising steps of a class picture", group=_PRIOR)
    prior_generation_guidance_scale: float = setting(4.0, "guidance scale of a class picture", group=_PRIOR)
    prior_generation_precision: str | None = setting(
        None,
        "precision of the model that draws them (default: as in training)",
        group=_PRIOR,
        choices=("no", "fp32", "fp16", "bf16"),
    )
