"""Drawing with a pipeline: pictures that depend on nothing but their settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from svft_diffusion.errors import UserError
from svft_diffusion.models.loading import load_pipeline
from svft_diffusion.models.text import truncated_text


class Drawn(NamedTuple):
    """A picture from a pipeline."""

    image: Image.Image
    blacked_out: bool  # by the base model's safety checker


def open_pipeline(
    name: str,
    *,
    device: torch.device,
    dtype: str = "float32",
    revision: str | None = None,
    variant: str | None = None,
    base_config: Path | None = None,
    vae: str | None = None,
    local_files_only: bool = False,
    disable_safety_checker: bool = False,
) -> DiffusionPipeline:
    """The base model ``name`` on ``device``, ready for `generate`; see `svft_diffusion.models.loading.load_pipeline`.

    Raises:
        UserError: the model can't be loaded.
    """
    pipeline = load_pipeline(
        name,
        dtype=getattr(torch, dtype),
        revision=revision,
        variant=variant,
        base_config=base_config,
        vae=vae,
        local_files_only=local_files_only,
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

    return generate_batch(
        pipeline,
        prompt,
        seeds=[seed],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        max_sequence_length=max_sequence_length,
        on_step=on_step,
    )[0].image


def generate_batch(
    pipeline: DiffusionPipeline,
    prompt: str,
    *,
    seeds: Sequence[int],
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[Drawn]:
    """A picture for each seed, in one pass; see `generate`, whose pictures these are but for rounding.

    Raises:
        UserError: as `generate`.
    """

    def report(_pipeline: DiffusionPipeline, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1)
        return tensors

    pipeline.set_progress_bar_config(disable=True)
    texts = {"prompt": prompt, **arguments_of_few(pipeline, negative_prompt, max_sequence_length)}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    if len(seeds) > 1:
        texts |= {name: [text] * len(seeds) for name, text in texts.items() if isinstance(text, str)}
    with _dtype_of_vae_kept(pipeline):
        result = pipeline(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators if len(seeds) > 1 else generators[0],
            callback_on_step_end=report,
            **texts,
        )
    # Not every pipeline has a safety checker, and one that was left out says nothing.
    blacked_out = getattr(result, "nsfw_content_detected", None) or [False] * len(seeds)
    return [Drawn(image, bool(black)) for image, black in zip(result.images, blacked_out, strict=True)]


def arguments_of_few(
    pipeline: DiffusionPipeline, negative_prompt: str, max_sequence_length: int | None = None
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


@contextmanager
def _dtype_of_vae_kept(pipeline: DiffusionPipeline) -> Iterator[None]:
    """The pipeline of SDXL casts its VAE up to decode in float16, and leaves it so where decoding fails: then no later
    picture could be drawn."""
    vae = getattr(pipeline, "vae", None)
    dtype = None if vae is None else vae.dtype
    try:
        yield
    finally:
        if vae is not None and vae.dtype != dtype:
            vae.to(dtype=dtype)


def facts_of(pipeline: DiffusionPipeline, image: Image.Image) -> dict[str, Any]:
    """Settings of a picture that are known after its making only: its size and the base model's scheduler."""
    scheduler = type(pipeline.scheduler).__name__.removesuffix("Scheduler")
    return {"width": image.width, "height": image.height, "scheduler": scheduler}


def words_not_read(pipeline: DiffusionPipeline, prompt: str) -> dict[str, str]:
    """For the settings of a picture: the end of a prompt that is too long for the base model's text encoders."""
    lost = truncated_text(pipeline, prompt)
    return {"prompt_not_read": lost} if lost else {}
