"""Settings of the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svft_diffusion.errors import UserError
from svft_diffusion.sampling.picture_size import check_picture_size
from svft_diffusion.settings import setting

ON_MISMATCH = ("error", "align", "force")
DTYPES = ("float32", "float16", "bfloat16")
_AXES = ("adapter", "weights", "prompt", "seed", "num_inference_steps", "guidance_scale", "scheduler")


@dataclass(frozen=True)
class SamplingConfig:
    """What to draw, with which adapters, and where to put it.

    Every combination of what lists hold is drawn; one value may stand for a list of it.
    """

    pretrained_model_name_or_path: str = setting(
        "toybox",
        "base model: toybox (embedded), a diffusers folder, a .safetensors file, or a Hugging Face Hub name",
        group="base model",
    )
    base_config: Path | None = setting(
        None,
        "for a file: a pipeline folder with its settings and tokenizers (default: from the Hub)",
        group="base model",
    )
    revision: str | None = setting(None, "branch, tag or commit of a Hub model", group="base model")
    variant: str | None = setting(None, "file variant of the base model, such as fp16", group="base model")
    pretrained_vae_model_name_or_path: str | None = setting(
        None,
        "another VAE for the pictures: its folder, or its name on the Hub (default: the base's)",
        group="base model",
    )
    local_files_only: bool = setting(False, "never ask the Hub; use what was downloaded before", group="base model")
    disable_safety_checker: bool = setting(
        False, "leave out the safety checker that the base model brings along", group="base model"
    )

    adapter: list[str] = setting(
        [],
        "FILE[:weight], repeatable; all act at once; no weight means 1, negative ones are allowed, unet=0.5,te=0.2 is "
        "one for each component; a folder stands for the adapter.safetensors in it",
        group="adapters",
    )
    weights: list[float] = setting(
        [],
        "strengths, one row of the grid each: every adapter's weight is multiplied by it "
        "(0 0.5 1 shows the base model, half and full strength)",
        group="adapters",
    )
    on_mismatch: str = setting(
        "error",
        "an adapter of another base: error refuses it, align fits it to this base as far as it goes and says how far, "
        "force loads whatever fits in shape",
        group="adapters",
        choices=ON_MISMATCH,
    )

    prompt: list[str] = setting(
        [],
        "what to draw, repeatable; <adapter:NAME:0.8> in it gives an adapter its weight in this prompt, {token} and "
        "{class} stand for the first adapter's trigger and class word",
        group="pictures",
    )
    prompts: str | None = setting(
        None,
        "more prompts: a .txt file with one on each line; .csv, .json, .jsonl or .yaml with prompt, negative_prompt, "
        "name, seed, num_images, num_inference_steps, guidance_scale and scheduler; or dreambooth_object or "
        "dreambooth_live, the lists of DreamBooth's evaluation",
        group="pictures",
    )
    negative_prompt: str = setting("", "what to avoid", group="pictures")
    token: str | None = setting(None, "what {token} stands for (default: the adapter's trigger)", group="pictures")
    class_word: str | None = setting(None, "what {class} stands for (default: the adapter's)", group="pictures")
    num_images: int = setting(1, "pictures for each combination and seed", group="pictures")
    seed: list[int] = setting([0], "seed of the first picture, repeatable; picture i has seed + i", group="pictures")
    num_inference_steps: list[int] = setting([25], "denoising steps, repeatable", group="pictures")
    guidance_scale: list[float] = setting(
        [4.0],
        "how strictly the prompt is followed, repeatable; 4 suits toybox, 7.5 is usual for Stable Diffusion",
        group="pictures",
    )
    scheduler: list[str] = setting(
        ["default"],
        "sampling method, repeatable, such as euler_a or dpm++_2m_karras; the base model's own by default",
        group="pictures",
    )
    height: int | None = setting(None, "pixels, default: the base model's own", group="pictures")
    width: int | None = setting(None, "pixels, default: the base model's own", group="pictures")

    output_dir: Path | None = setting(
        None, "where to write, default: a new numbered folder in outputs/samples", group="output"
    )
    overwrite: bool = setting(
        False, "replace other pictures of the same names, and grids and lists of other pictures", group="output"
    )
    embed_adapter: bool | None = setting(
        None,
        "put the adapters that made a picture into it, so that the picture can be loaded like an adapter "
        "(default: those of up to 1 MB)",
        group="output",
    )

    device: str = setting("auto", "auto, cuda, cuda:1, mps or cpu", group="computing")
    dtype: str = setting("float32", "precision of the base model", group="computing", choices=DTYPES)
    batch_size: int = setting(
        1,
        "pictures of one combination that are drawn at once; with more than 1, pixels may differ in the last bit",
        group="computing",
    )
    threads: int = setting(
        1,
        "threads of torch on the CPU, in each process; pictures are the same to the byte for the same number",
        group="computing",
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

    def __post_init__(self) -> None:
        for name in _AXES:
            value: Any = getattr(self, name)
            if not isinstance(value, list):
                object.__setattr__(self, name, [value])


def check_values(config: SamplingConfig) -> None:
    """Refuse what can be told to be wrong at once, without any import that takes its time.

    Raises:
        UserError: names the setting and what it may be.
    """
    if not config.prompt and config.prompts is None:
        raise UserError('what should be drawn? Give at least one --prompt "..."')
    if any(not prompt.strip() for prompt in config.prompt):
        raise UserError("a --prompt is empty")
    if any(not -1e4 < weight < 1e4 for weight in config.weights):
        raise UserError("--weights must be finite numbers of a sensible size")
    for name in ("seed", "num_inference_steps", "guidance_scale", "scheduler"):
        if not getattr(config, name):
            raise UserError(f"--{name} holds no value")
    for name in ("num_images", "batch_size", "threads"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(config, name)}")
    check_picture_size(height=config.height, width=config.width)
