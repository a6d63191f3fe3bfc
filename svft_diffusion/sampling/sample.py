"""The sampler: every prompt at every strength with every seed, each picture on its own, and a grid of all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from svft_diffusion.adapters import load_adapter, set_adapters
from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.errors import UserError
from svft_diffusion.factors import use_cache
from svft_diffusion.files.whole_files import check_writable
from svft_diffusion.models.loading import default_resolution, load_pipeline, resolve_base
from svft_diffusion.models.text import truncated_text
from svft_diffusion.sampling.adapter_choice import check_adapters, parse_adapter_choice, refuse_twice
from svft_diffusion.sampling.config import SamplingConfig
from svft_diffusion.sampling.devices import resolve_device
from svft_diffusion.sampling.embedding import adapters_to_embed, embedded_in_picture
from svft_diffusion.sampling.grid import labelled_grid
from svft_diffusion.sampling.plan import (
    GRID_FILE,
    PlannedRow,
    check_config,
    check_overwriting,
    new_numbered_folder,
    plan_rows,
)
from svft_diffusion.sampling.png import save_png

__all__ = ["SamplingConfig", "SamplingResult", "facts_of", "generate", "open_pipeline", "sample"]

DEFAULT_OUTPUT_PARENT = Path("outputs/samples")


@dataclass(frozen=True)
class SamplingResult:
    """What a run wrote."""

    output_dir: Path
    pictures: list[Path]
    grid: Path
    embedded: dict[str, int]  # adapters that the pictures carry where they act, with their sizes in bytes


def sample(config: SamplingConfig) -> SamplingResult:
    """Generate the pictures that ``config`` asks for. Picture i of every prompt and strength has seed + i.

    Raises:
        UserError: settings, adapters or output folder that can't work, before the base model is loaded.
    """
    check_config(config)
    use_cache(config.factor_cache, config.factor_cache_size)
    device = resolve_device(config.device)
    resolve_base(config.pretrained_model_name_or_path, config.base_config)
    adapters = check_adapters(
        [parse_adapter_choice(text) for text in config.adapter],
        config.pretrained_model_name_or_path,
        variant=config.variant,
        on_mismatch=cast(OnMismatch, config.on_mismatch),
    )
    embedded = adapters_to_embed(adapters, config.embed_adapter)
    refuse_twice(adapters)
    output_dir = config.output_dir or new_numbered_folder(DEFAULT_OUTPUT_PARENT)
    rows = plan_rows(config, adapters)
    if not config.overwrite:
        check_overwriting(output_dir, rows, width=config.width, height=config.height)
    check_writable(output_dir)

    pipeline = open_pipeline(
        config.pretrained_model_name_or_path,
        device=device,
        dtype=config.dtype,
        revision=config.revision,
        variant=config.variant,
        base_config=config.base_config,
        disable_safety_checker=config.disable_safety_checker,
    )
    resolution = default_resolution(pipeline)
    config = replace(config, width=config.width or resolution, height=config.height or resolution)
    if not config.overwrite:
        check_overwriting(output_dir, rows, width=config.width, height=config.height)
    for prompt in config.prompt:
        if lost := truncated_text(pipeline, prompt):
            tqdm.write(f"the text encoder does not read the end of a prompt: {lost!r}")
    for adapter in adapters:
        load_adapter(pipeline, adapter.file, adapter.name, on_mismatch=cast(OnMismatch, config.on_mismatch))
    pictures = _generate_rows(pipeline, rows, config, output_dir, embedded)
    return SamplingResult(
        output_dir,
        [path for row in pictures for path in row],
        _save_grid(output_dir, rows, pictures),
        embedded={name: len(content) for name, content in embedded.items()},
    )


def open_pipeline(
    name: str,
    *,
    device: torch.device,
    dtype: str = "float32",
    revision: str | None = None,
    variant: str | None = None,
    base_config: Path | None = None,
    disable_safety_checker: bool = False,
) -> DiffusionPipeline:
    """The base model ``name`` on ``device``, ready for `generate`.

    Raises:
        UserError: the model can't be loaded.
    """
    pipeline = load_pipeline(
        name, dtype=getattr(torch, dtype), revision=revision, variant=variant, base_config=base_config
    )
    if disable_safety_checker and getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)
        pipeline.register_to_config(requires_safety_checker=False)
    return pipeline.to(device)


def generate(
    pipeline: DiffusionPipeline,
    prompt: str,
    *,
    seed: int,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Image.Image:
    """One picture: batch of one, noise from a generator on the CPU, so that it depends on nothing but its settings.

    Args:
        pipeline: with its adapters at the wanted weights.
        height: pixels; the base model's own when left out, like ``width``.
        max_sequence_length: tokens that T5 reads (default: the pipeline's own); nothing to pipelines without it.
        on_step: called after each denoising step with the number of steps done.

    Raises:
        UserError: a negative prompt for a base model that takes none.
    """

    def report(_pipeline: DiffusionPipeline, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1)
        return tensors

    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        prompt=prompt,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_step_end=report,
        **_arguments_of_few(pipeline, negative_prompt, max_sequence_length),
    )
    image: Image.Image = result.images[0]
    return image


def _arguments_of_few(
    pipeline: DiffusionPipeline, negative_prompt: str, max_sequence_length: int | None
) -> dict[str, Any]:
    """Arguments that not every pipeline takes.

    Raises:
        UserError: a negative prompt for one whose guidance compares with nothing, as that of Flux.
    """
    known = inspect.signature(type(pipeline).__call__).parameters
    arguments: dict[str, Any] = {}
    if negative_prompt:
        if "negative_prompt" not in known or "true_cfg_scale" in known:
            raise UserError("this base model takes no negative prompt; leave it out")
        arguments["negative_prompt"] = negative_prompt  # without one, SDXL takes zeros, which "" is not
    if max_sequence_length is not None and "max_sequence_length" in known:
        arguments["max_sequence_length"] = max_sequence_length
    return arguments


def facts_of(pipeline: DiffusionPipeline, image: Image.Image) -> dict[str, Any]:
    """Settings of a picture that are known after its making only: its size and the base model's scheduler."""
    scheduler = type(pipeline.scheduler).__name__.removesuffix("Scheduler")
    return {"width": image.width, "height": image.height, "scheduler": scheduler}


def _generate_rows(
    pipeline: DiffusionPipeline,
    rows: list[PlannedRow],
    config: SamplingConfig,
    output_dir: Path,
    embedded: Mapping[str, bytes],
) -> list[list[Path]]:
    paths: list[list[Path]] = []
    with tqdm(total=sum(len(row.pictures) for row in rows), unit="picture") as progress:
        for row in rows:
            set_adapters(pipeline, row.weights)
            paths.append([])
            for picture in row.pictures:
                image = generate(
                    pipeline,
                    row.prompt,
                    seed=picture.seed,
                    num_inference_steps=config.num_inference_steps,
                    guidance_scale=config.guidance_scale,
                    negative_prompt=config.negative_prompt,
                    height=config.height,
                    width=config.width,
                )
                settings = picture.settings | facts_of(pipeline, image)
                carried = embedded_in_picture(embedded, row.weights)
                paths[-1].append(save_png(image, output_dir / picture.file_name, settings, carried))
                progress.update()
    return paths


def _save_grid(output_dir: Path, rows: list[PlannedRow], pictures: list[list[Path]]) -> Path:
    grid = labelled_grid(
        [[_opened(path) for path in row] for row in pictures],
        [row.label for row in rows],
        [f"seed {picture.seed}" for picture in rows[0].pictures],
    )
    return save_png(grid, output_dir / GRID_FILE, {"pictures": [path.name for row in pictures for path in row]})


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image
