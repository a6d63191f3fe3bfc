"""Settings of an edit, and which of the trainer's settings it takes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from svft_diffusion.errors import UserError
from svft_diffusion.factors.location import parse_size
from svft_diffusion.sampling.config import DTYPES, ON_MISMATCH
from svft_diffusion.sampling.picture_size import check_picture_size
from svft_diffusion.sampling.plan import check_picture_settings
from svft_diffusion.settings import setting, settings_of
from svft_diffusion.training.config import TrainingConfig

MODES = ("inversion", "img2img", "inpaint")
FITS = ("crop", "pad", "resize")
DEFAULT_STRENGTH = {"img2img": 0.6, "inpaint": 1.0}

_BASE = "base model"
_EDIT = "edit"
_ADAPTERS = "adapters"
_OUTPUT = "output"
_COMPUTING = "computing"

_TRAINING_GROUPS = ("adapter", "adaptive vector freezing", "objective", "optimizer")
_TRAINING_SETTINGS = (
    "train_batch_size", "max_train_steps", "gradient_accumulation_steps", "timestep_sampling", "adapter_dtype",
    "gradient_checkpointing", "allow_tf32", "compress_activations",
)  # fmt: skip
TRAINING_SETTINGS = tuple(
    item.name
    for item in settings_of(TrainingConfig)
    if item.group in _TRAINING_GROUPS or item.name in _TRAINING_SETTINGS
)
"""What of `TrainingConfig` an edit can be told; it decides the rest itself."""


@dataclass(frozen=True)
class EditConfig:
    """What to make of a picture, and how."""

    pretrained_model_name_or_path: str = setting(
        "toybox",
        "base model: toybox (embedded), a diffusers folder, a .safetensors file, or a Hugging Face Hub name",
        group=_BASE,
    )
    base_config: Path | None = setting(
        None, "for a file: a pipeline folder with its settings and tokenizers (default: from the Hub)", group=_BASE
    )
    revision: str | None = setting(None, "branch, tag or commit of a Hub model", group=_BASE)
    variant: str | None = setting(None, "file variant of the base model, such as fp16", group=_BASE)
    disable_safety_checker: bool = setting(
        False, "leave out the safety checker that the base model brings along", group=_BASE
    )

    prompt: str | None = setting(None, "what the edited picture shows", group=_EDIT)
    source_prompt: str | None = setting(
        None,
        "what the picture shows as it is, without a special word: an adapter is trained on that, and kept for the next "
        "edit",
        group=_EDIT,
    )
    mode: str = setting(
        "inversion",
        "inversion: start from the noise that draws the picture; img2img: from a noisy copy of it; inpaint: draw what "
        "is white in --mask, and leave the rest alone",
        group=_EDIT,
        choices=MODES,
    )
    mask: Path | None = setting(
        None, "inpaint: a picture of the same size, white where to draw, black where nothing changes", group=_EDIT
    )
    strength: float | None = setting(
        None,
        f"img2img and inpaint: part of the steps that run, from (nearly) 0, which changes nothing, to 1, which starts "
        f"from noise alone (default: {DEFAULT_STRENGTH['img2img']} and {DEFAULT_STRENGTH['inpaint']})",
        group=_EDIT,
    )
    eta: float | None = setting(
        None, "inversion: noise in every step, 0 to 1, for edits that change the structure (default: 0)", group=_EDIT
    )
    slerp: float | None = setting(
        None, "inversion: part of new noise in the noise found, 0 to 1, for the same; 0.5 is a start", group=_EDIT
    )
    inversion_refinements: int = setting(
        3, "looks more at every step of the inversion, so that it leads back to the picture; 0: plain", group=_EDIT
    )
    negative_prompt: str = setting("", "what to avoid", group=_EDIT)
    num_inference_steps: int = setting(50, "denoising steps, and steps of the inversion", group=_EDIT)
    guidance_scale: float = setting(3.0, "how strictly the prompt is followed", group=_EDIT)
    seed: int = setting(0, "seed of everything random, training included", group=_EDIT)
    fit: str = setting(
        "crop",
        "how the picture gets the base model's shape: crop cuts its middle; pad mirrors its edges outwards, which is "
        "cut off again; resize squeezes it, which is undone",
        group=_EDIT,
        choices=FITS,
    )
    height: int | None = setting(None, "pixels that are drawn, default: the base model's own", group=_EDIT)
    width: int | None = setting(None, "pixels that are drawn, default: the base model's own", group=_EDIT)

    adapter: list[str] = setting(
        [],
        "FILE[:weight] or FILE:unet=0.5,te=0.2, repeatable: adapters that act as well; with one of them, "
        "--source_prompt can be left out",
        group=_ADAPTERS,
    )
    strengths: list[float] = setting(
        [], "a picture for each: every adapter's weight, the trained one's included, is multiplied by it (default: 1)",
        group=_ADAPTERS,
    )  # fmt: skip
    on_mismatch: str = setting(
        "error",
        "an adapter of another base: error refuses it, align fits it to this base as far as it goes, force loads "
        "whatever fits in shape",
        group=_ADAPTERS,
        choices=ON_MISMATCH,
    )

    output: Path | None = setting(
        None,
        "where to write, a .png file (default: a new one in outputs/edits); with several --strengths all at a glance, "
        "and each in a file of its own beside it. The adapter is kept in the folder adapters there",
        group=_OUTPUT,
    )
    overwrite: bool = setting(False, "replace files that are there", group=_OUTPUT)
    embed_adapter: bool | None = setting(
        None,
        "put the adapters that acted into the picture, so that it can be loaded like an adapter (default: those of up "
        "to 1 MB)",
        group=_OUTPUT,
    )

    device: str = setting("auto", "auto, cuda, cuda:1, mps or cpu", group=_COMPUTING)
    dtype: str = setting("float32", "precision of the base model, in training too", group=_COMPUTING, choices=DTYPES)
    factor_cache: Path | None = setting(
        None, "folder of decompositions, shared by all runs (default: the platform's cache folder)", group=_COMPUTING
    )
    factor_cache_size: str | None = setting(
        None, "how much that folder may hold, such as 5GB (default: 20 GiB)", group=_COMPUTING
    )

    @property
    def resolved_strength(self) -> float:
        """Part of the steps that run, the mode's default filled in."""
        return DEFAULT_STRENGTH[self.mode] if self.strength is None else self.strength


def check_edit(config: EditConfig) -> None:
    """Refuse settings that can't work, without looking at a file.

    Raises:
        UserError: names the setting and what it may be.
    """
    for item in settings_of(EditConfig):
        item.convert(getattr(config, item.name))
    if not (config.prompt or "").strip():
        raise UserError('what should the picture show? Give --prompt "..."')
    if config.source_prompt is not None and not config.source_prompt.strip():
        raise UserError("--source_prompt is empty; say what the picture shows as it is")
    if config.mode == "inversion" and config.source_prompt is None and not config.adapter:
        raise UserError(
            "say what the picture shows as it is with --source_prompt, so that an adapter is trained on it, or give "
            "an --adapter that knows it"
        )
    _check_mode(config)
    if config.strengths and config.source_prompt is None and not config.adapter:
        raise UserError("--strengths scales adapters, but there is none: give --source_prompt or --adapter")
    if any(not -1e4 < strength < 1e4 for strength in config.strengths):
        raise UserError("--strengths must be finite numbers of a sensible size")
    if len({f"{strength + 0.0:g}" for strength in config.strengths}) < len(config.strengths):
        raise UserError("two of the --strengths are too close to get different file names")
    check_picture_settings(config.seed, config.num_inference_steps, config.guidance_scale)
    check_picture_size(height=config.height, width=config.width)
    if config.output is not None and config.output.suffix.lower() != ".png":
        raise UserError(f"the output {config.output} must end in .png, which keeps the settings of a picture")
    if config.factor_cache_size is not None:
        parse_size(config.factor_cache_size, "--factor_cache_size")


def _check_mode(config: EditConfig) -> None:
    inverts = config.mode == "inversion"
    for name in ("strength",) if inverts else ("eta", "slerp"):
        if getattr(config, name) is not None:
            hint = "; --strengths scales adapters" if inverts else ""
            raise UserError(f"--{name} has no effect with --mode {config.mode}{hint}")
    if (config.mask is not None) != (config.mode == "inpaint"):
        raise UserError(
            "--mode inpaint needs a --mask, white where to draw"
            if config.mask is None
            else f"--mask has no effect with --mode {config.mode}; take --mode inpaint"
        )
    for name in ("eta", "slerp"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"--{name} must be between 0 and 1, got {value:g}")
    if config.eta is not None and config.slerp is not None:
        raise UserError("--eta and --slerp are two ways to the same; give one of them")
    default = {item.name: item.default for item in fields(EditConfig)}["inversion_refinements"]
    if not inverts and config.inversion_refinements != default:
        raise UserError(f"--inversion_refinements has no effect with --mode {config.mode}")
    if not 0 <= config.inversion_refinements <= 100:
        raise UserError(f"--inversion_refinements must be between 0 and 100, got {config.inversion_refinements}")
    if inverts:
        return
    if not 0 < config.resolved_strength <= 1:
        raise UserError(f"--strength must be above 0 and at most 1, got {config.resolved_strength:g}")
    if int(config.num_inference_steps * config.resolved_strength) < 1:
        raise UserError(
            f"--strength {config.resolved_strength:g} of {config.num_inference_steps} steps is less than one; raise "
            "--strength or --num_inference_steps"
        )
