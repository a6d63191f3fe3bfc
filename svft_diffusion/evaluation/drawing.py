"""The pictures that are scored: planned before the base model is loaded, and read when they are there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.config import EvaluationConfig
from svft_diffusion.evaluation.scoring import PromptedPictures
from svft_diffusion.evaluation.subjects import SubjectPrompts
from svft_diffusion.models.loading import EMBEDDED_MODEL, stored_pipeline_class
from svft_diffusion.sampling.adapter_choice import CheckedAdapter
from svft_diffusion.sampling.plan import picture_settings, slug
from svft_diffusion.sampling.png import is_damaged_png, read_png, read_png_settings

NAME_THE_BASE = "say with --pretrained_model_name_or_path where the base model is"
_GUIDANCE_OF_TOYBOX, _USUAL_GUIDANCE = 4.0, 7.5
_GUIDANCE_OF_KIND = {
    "FluxPipeline": 3.5,
    "StableDiffusion3Pipeline": 7.0,
}  # diffusers' own; more draws in glaring colors


@dataclass(frozen=True)
class PlannedPicture:
    """A picture to be scored."""

    file: Path
    prompt: str
    judged_prompt: str  # without the token
    seed: int
    settings: dict[str, Any]  # what its file tells; its size and scheduler are known after loading only


def guidance_scale(config: EvaluationConfig, base: str) -> float:
    """The scale that was asked for, or the usual one of the base model."""
    if config.guidance_scale is not None:
        return config.guidance_scale
    if base == EMBEDDED_MODEL:
        return _GUIDANCE_OF_TOYBOX
    kind = stored_pipeline_class(base, base_config=config.base_config, revision=config.revision)
    return _GUIDANCE_OF_KIND.get(kind or "", _USUAL_GUIDANCE)


def plan_subject(
    folder: Path, prompts: SubjectPrompts, adapter: CheckedAdapter | None, config: EvaluationConfig, base: str
) -> list[PlannedPicture]:
    """Pictures of the subject: ``num_images`` for each prompt; without an adapter, the base model's."""
    return [
        _planned(folder / f"{number:03d}", prompt, judged, config.seed + image, adapter, config, base)
        for number, (prompt, judged) in enumerate(zip(prompts.with_token, prompts.without_token, strict=True))
        for image in range(config.num_images)
    ]


def plan_class(
    folder: Path, prompts: SubjectPrompts, adapter: CheckedAdapter | None, config: EvaluationConfig, base: str
) -> list[PlannedPicture]:
    """``num_class_images`` pictures of the class, by the prompts without the token in turn, each with a new seed."""
    texts = prompts.without_token
    return [
        _planned(
            folder / f"{number:03d}", texts[number % len(texts)], texts[number % len(texts)], config.seed + number,
            adapter, config, base,
        )
        for number in range(config.num_class_images)
    ]  # fmt: skip


def _planned(
    number: Path,
    prompt: str,
    judged_prompt: str,
    seed: int,
    adapter: CheckedAdapter | None,
    config: EvaluationConfig,
    base: str,
) -> PlannedPicture:
    sizes = {name: size for name in ("height", "width") if (size := getattr(config, name)) is not None}
    settings = picture_settings(
        base=base,
        adapters=[] if adapter is None else [(adapter, adapter.weight)],
        prompt=prompt,
        negative_prompt="",
        seed=seed,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=guidance_scale(config, base),
        dtype=config.dtype,
    )
    file = number.with_name(f"{number.name}_{slug(prompt)}_seed{seed}.png")
    return PlannedPicture(file, prompt, judged_prompt, seed, settings | sizes)


def check_others(planned: Iterable[PlannedPicture], sizes: dict[str, int]) -> None:
    """Refuse to replace pictures that were made with other settings; damaged ones are made again.

    Args:
        sizes: height and width in pixels, as far as they are known.

    Raises:
        UserError: names the first such file and the ways out.
    """
    for picture in planned:
        if picture.file.exists() and not is_made(picture, sizes) and not is_damaged_png(picture.file):
            raise UserError(
                f"{picture.file} is another picture; choose another --output_dir, or replace it with --overwrite"
            )


def is_made(planned: PlannedPicture, sizes: dict[str, int]) -> bool:
    """Whether the picture is there, whole, and made with the planned settings."""
    if not planned.file.exists():
        return False
    try:
        found = read_png_settings(planned.file)
    except UserError:
        return False
    return all(found.get(name) == value for name, value in {**planned.settings, **sizes}.items())


def is_blacked_out(picture: PlannedPicture) -> bool:
    """Whether the base model's safety checker has hidden a picture that is there."""
    return read_png_settings(picture.file).get("blacked_out") is True


def drawn_pictures(planned: Sequence[PlannedPicture]) -> PromptedPictures | None:
    """The pictures that a `svft_diffusion.evaluation.painter.Painter` has drawn; None if none are planned.

    Raises:
        UserError: one is gone.
    """
    try:
        pictures = [read_png(picture.file)[0].convert("RGB") for picture in planned]
    except UserError as problem:
        raise UserError(f"{problem}: files in the output folder changed while they were in use; start again") from None
    return PromptedPictures(pictures, [picture.judged_prompt for picture in planned]) if pictures else None
