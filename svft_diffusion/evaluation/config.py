"""Settings of `svft-diffusion evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svft_diffusion.errors import UserError
from svft_diffusion.sampling.config import DTYPES, ON_MISMATCH
from svft_diffusion.sampling.picture_size import check_picture_size
from svft_diffusion.settings import setting

KINDS = ("live", "object")
"""The kinds of subjects that DreamBooth's data set tells apart, each with its list of prompts."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What to score, against what, and with what."""

    adapter: list[str] = setting(
        [],
        "FILE[:weight], repeatable: each is scored by itself; a folder stands for the adapter.safetensors in it",
        group="what to score (one of these)",
    )
    run: Path | None = setting(
        None, "folder of a training run: every adapter that it has kept", group="what to score (one of these)"
    )
    pictures: Path | None = setting(
        None,
        "folder of pictures that exist; each holds its prompt, or a .txt beside it",
        group="what to score (one of these)",
    )
    subjects: Path | None = setting(
        None,
        "YAML list of subjects, each with name, instance_data_dir, adapter or pictures, and kind (live or object), "
        "token, class_word, prompts where wanted",
        group="what to score (one of these)",
    )

    instance_data_dir: Path | None = setting(
        None, "the real photos (default: those that the training run used)", group="subject"
    )
    token: str | None = setting(None, "its rare word (default: the trigger of the adapter)", group="subject")
    class_word: str | None = setting(None, "what the subject is (default: what the adapter says)", group="subject")

    prompts: str | None = setting(
        None,
        "dreambooth_object, dreambooth_live, toy, or a file (default: by the class word; toy on the embedded model)",
        group="protocol",
    )
    num_prompts: int | None = setting(None, "only the first so many prompts", group="protocol")
    num_images: int = setting(4, "pictures for each prompt; picture i has seed + i", group="protocol")
    num_class_images: int = setting(
        25, "pictures of the class, without the token, for prior preservation and drift (0: neither)", group="protocol"
    )
    seed: int = setting(0, "seed of the first picture", group="protocol")
    num_inference_steps: int = setting(25, "denoising steps", group="protocol")
    guidance_scale: float | None = setting(
        None,
        "how strictly prompts are followed (default: 4 for toybox, 3.5 for FLUX.1, 7 for SD 3.x, else 7.5)",
        group="protocol",
    )
    height: int | None = setting(None, "pixels, default: the base model's own", group="protocol")
    width: int | None = setting(None, "pixels, default: the base model's own", group="protocol")
    with_base: bool = setting(False, "score the base model without any adapter too", group="protocol")

    backbone: list[str] = setting(
        [],
        "NAME or NAME=FOLDER, repeatable, each with columns of its own: clip-vit-b32, clip-vit-l14, dino-vits16, "
        "dino-vits8, dinov2-small, dinov2-base, toy-identity, toy-text "
        "(default: dino-vits16 and clip-vit-b32, those of DreamBooth; on the embedded model its own)",
        group="measuring",
    )
    lpips: bool = setting(False, "diversity by LPIPS too (needs the package lpips, and torchvision)", group="measuring")

    pretrained_model_name_or_path: str | None = setting(
        None, "base model (default: what the adapters name)", group="base model"
    )
    base_config: Path | None = setting(
        None, "for a file: a pipeline folder with its settings and tokenizers", group="base model"
    )
    revision: str | None = setting(None, "branch, tag or commit of a Hub model", group="base model")
    variant: str | None = setting(None, "file variant of the base model, such as fp16", group="base model")
    on_mismatch: str = setting(
        "error", "an adapter of another base: refuse it, or align or force it", group="base model", choices=ON_MISMATCH
    )
    disable_safety_checker: bool = setting(
        False, "leave out the safety checker that the base model brings along", group="base model"
    )

    output_dir: Path | None = setting(
        None,
        "where to write, default: a new numbered folder in outputs/evaluation; "
        "pictures that are there already are not made again",
        group="output",
    )
    overwrite: bool = setting(False, "replace other pictures of the same names", group="output")

    device: str = setting("auto", "auto, cuda, cuda:1, mps or cpu", group="computing")
    dtype: str = setting("float32", "precision of the base model", group="computing", choices=DTYPES)
    threads: int = setting(
        1, "threads of torch on the CPU; pictures and scores are the same for the same number", group="computing"
    )
    factor_cache: Path | None = setting(
        None,
        "folder of decompositions, shared by all runs (default: the platform's cache folder)",
        group="computing",
    )
    factor_cache_size: str | None = setting(
        None,
        "how much that folder may hold, such as 5GB; what was not used for longest goes first (default: 20 GiB)",
        group="computing",
    )


def check_config(config: EvaluationConfig) -> None:
    """Refuse settings that can't work.

    Raises:
        UserError: names the setting and what it may be.
    """
    ways = {
        "--adapter": bool(config.adapter),
        "--run": config.run is not None,
        "--pictures": config.pictures is not None,
        "--subjects": config.subjects is not None,
    }
    given = [flag for flag, is_given in ways.items() if is_given]
    if not given:
        raise UserError(f"what should be scored? Give one of {', '.join(ways)}")
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} don't go together; give one of them")
    if config.subjects is not None:
        for name in ("instance_data_dir", "token", "class_word"):
            if getattr(config, name) is not None:
                raise UserError(f"--{name} differs between subjects; write {name} into {config.subjects}")
    lowest = {"num_prompts": 1, "num_images": 1, "num_class_images": 0, "threads": 1}
    for name, least in lowest.items():
        number = getattr(config, name)
        if number is not None and number < least:
            raise UserError(f"--{name} must be at least {least}, got {number}")
    check_picture_size(height=config.height, width=config.width)
