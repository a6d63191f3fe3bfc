"""The pictures that are scored: planned before the base model is loaded, and only missing ones are made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from svft_diffusion.adapters import load_adapter, set_adapters, unload_adapter
from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.config import EvaluationConfig
from svft_diffusion.evaluation.scoring import PromptedPictures
from svft_diffusion.evaluation.subjects import SubjectPrompts
from svft_diffusion.models.loading import EMBEDDED_MODEL, default_resolution
from svft_diffusion.sampling.adapter_choice import CheckedAdapter
from svft_diffusion.sampling.devices import resolve_device
from svft_diffusion.sampling.drawing import facts_of, generate, open_pipeline
from svft_diffusion.sampling.plan import picture_settings, slug
from svft_diffusion.sampling.png import is_damaged_png, read_png, save_png

NAME_THE_BASE = "say with --pretrained_model_name_or_path where the base model is"
_GUIDANCE_OF_TOYBOX, _USUAL_GUIDANCE = 4.0, 7.5


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
    return _GUIDANCE_OF_TOYBOX if base == EMBEDDED_MODEL else _USUAL_GUIDANCE


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


def check_others(planned: Iterable[PlannedPicture]) -> None:
    """Refuse to replace pictures that were made with other settings; damaged ones are made again.

    Raises:
        UserError: names the first such file and the ways out.
    """
    for picture in planned:
        if not picture.file.exists() or is_damaged_png(picture.file):
            continue
        if _made(picture) is None:
            raise UserError(
                f"{picture.file} is another picture; choose another --output_dir, or replace it with --overwrite"
            )


class Painter:
    """Draws what is missing; the base model is loaded when the first picture is, once for all adapters."""

    def __init__(self, base: str, config: EvaluationConfig) -> None:
        self._base, self._config = base, config
        self._device = resolve_device(config.device)
        self._pipeline: DiffusionPipeline | None = None

    def draw(self, planned: Sequence[PlannedPicture], adapter: CheckedAdapter | None, label: str) -> PromptedPictures:
        """The planned pictures, of which those that are there already are not made again.

        Raises:
            UserError: the base model can't be loaded, the adapter does not fit it, or a file can't be written.
        """
        missing = [picture for picture in planned if _made(picture) is None]
        if missing:
            self._make(missing, adapter, label)
        pictures = [_made(picture) for picture in planned]
        if any(picture is None for picture in pictures):
            raise UserError("pictures in the output folder vanished while they were in use; start again")
        return PromptedPictures(cast(list[Image.Image], pictures), [picture.judged_prompt for picture in planned])

    def _make(self, planned: Sequence[PlannedPicture], adapter: CheckedAdapter | None, label: str) -> None:
        pipeline = self._opened()
        config = self._config
        if adapter is not None:
            load_adapter(pipeline, adapter.file, adapter.name, on_mismatch=cast(OnMismatch, config.on_mismatch))
            set_adapters(pipeline, {adapter.name: adapter.weight})
        try:
            resolution = default_resolution(pipeline)
            for picture in tqdm(planned, desc=label, unit="picture"):
                image = generate(
                    pipeline,
                    picture.prompt,
                    seed=picture.seed,
                    num_inference_steps=config.num_inference_steps,
                    guidance_scale=picture.settings["guidance_scale"],
                    height=config.height or resolution,
                    width=config.width or resolution,
                )
                save_png(image, picture.file, picture.settings | facts_of(pipeline, image))
        finally:
            if adapter is not None:
                unload_adapter(pipeline, adapter.name)

    def _opened(self) -> DiffusionPipeline:
        if self._pipeline is None:
            config = self._config
            try:
                self._pipeline = open_pipeline(
                    self._base,
                    device=self._device,
                    dtype=config.dtype,
                    revision=config.revision,
                    variant=config.variant,
                    base_config=config.base_config,
                    disable_safety_checker=config.disable_safety_checker,
                )
            except UserError as problem:
                if config.pretrained_model_name_or_path is not None:
                    raise
                raise UserError(f"{problem}; {NAME_THE_BASE}") from problem
        return self._pipeline


def _made(planned: PlannedPicture) -> Image.Image | None:
    """The picture, if it is there, whole, and made with the planned settings."""
    if not planned.file.exists():
        return None
    try:
        image, settings = read_png(planned.file)
    except UserError:
        return None
    return image.convert("RGB") if _says(settings, planned.settings) else None


def _says(found: dict[str, Any], planned: dict[str, Any]) -> bool:
    return all(found.get(name) == value for name, value in planned.items())
