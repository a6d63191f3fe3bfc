"""Small pictures of what a pipeline is about to draw, while it does, without its VAE.

Latents of a VAE are nearly pictures: the colour of a place follows from its channels by a linear map. The map is
fitted once for a base model, to what its own VAE makes of a few patches of colour. What is shown is not the noisy
latents but the denoiser's opinion, at every step, of how they will be without noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional

# Patches of colour to fit the map to: so many pictures, of so many places, with so many random colours along a side.
_PICTURES, _PLACES, _COLORS = 4, 8, 4
# Colours of patches leave some ways to combine the channels open; those with small factors show the least noise.
_RIDGE = 0.03
_LARGEST_SIDE = 256  # pixels
# A base with a safety checker shows the colours alone: the checker sees nothing but finished pictures.
_LARGEST_SIDE_UNCHECKED = 16


class Previews:
    """Shows the latents of one base model."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._map = _fitted_map(pipeline)
        self._pixels_per_place = int(getattr(pipeline, "vae_scale_factor", 1))

    @contextmanager
    def following(self, pipeline: DiffusionPipeline) -> Iterator[Callable[[], Image.Image | None]]:
        """Within the context, the function tells what the pipeline is about to draw, as of its last step.

        It returns None where it can't be told: latents in another order, as those of Flux, or an unknown scheduler.
        """
        scheduler = pipeline.scheduler
        step = scheduler.step
        last: tuple[Tensor, Any, Tensor] | None = None

        @functools.wraps(step)  # pipelines look at its parameters
        def noting(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **named: Any) -> Any:
            nonlocal last
            last = model_output, timestep, sample
            return step(model_output, timestep, sample, *args, **named)

        checked = getattr(pipeline, "safety_checker", None) is not None
        scheduler.step = noting
        try:
            yield lambda: None if last is None else self._picture(without_noise(scheduler, *last), checked)
        finally:
            del scheduler.step

    def _picture(self, latents: Tensor | None, checked: bool) -> Image.Image | None:
        if self._map is None or latents is None or latents.ndim != 4 or latents.shape[1] != len(self._map) - 1:
            return None
        latents = latents[:1].float().cpu()  # MPS can't pool to sizes that don't divide
        if checked:
            latents = functional.adaptive_avg_pool2d(latents, _coarse(*latents.shape[-2:]))
        colors = _with_ones(latents[0].movedim(0, -1)) @ self._map
        image = Image.fromarray(((colors.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy())
        larger = max(1, min(self._pixels_per_place, _LARGEST_SIDE // max(image.size)))
        return image.resize((image.width * larger, image.height * larger), Image.Resampling.BICUBIC)


def _fitted_map(pipeline: DiffusionPipeline) -> Tensor | None:
    """(C + 1, 3) from a place's channels and a one to its colour in [-1, 1]; None for a VAE of another kind."""
    vae = getattr(pipeline, "vae", None)
    if not hasattr(vae, "encode") or not hasattr(getattr(vae, "config", None), "scaling_factor"):
        return None
    generator = torch.Generator().manual_seed(0)
    side = _PLACES * int(pipeline.vae_scale_factor)
    patches = torch.rand(_PICTURES, 3, _COLORS, _COLORS, generator=generator) * 2 - 1
    pixels = functional.interpolate(patches, size=(side, side), mode="bilinear")
    latents = _encoded(vae, pixels)
    if latents is None:
        return None
    places = functional.adaptive_avg_pool2d(pixels, (latents.shape[-2], latents.shape[-1]))
    known, colors = (values.movedim(1, -1).flatten(0, 2) for values in (latents, places))
    if not known.isfinite().all():
        return None
    known = _with_ones(known)
    penalty = torch.diag(torch.tensor([_RIDGE * len(known)] * (known.shape[1] - 1) + [0.0]))
    return torch.linalg.solve(known.T @ known + penalty, known.T @ colors)


def _encoded(vae: Any, pixels: Tensor) -> Tensor | None:
    """Latents (B, C, h, w) as the denoiser sees them, in float32 on the CPU; None for a VAE that tells no distribution,
    such as TAESD."""
    dtype = vae.dtype
    too_coarse = dtype == torch.float16 and bool(vae.config.get("force_upcast"))
    if too_coarse:
        vae.to(dtype=torch.float32)  # as pipelines do to decode; the way back loses nothing
    try:
        with torch.no_grad():
            encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    finally:
        if too_coarse:
            vae.to(dtype=dtype)
    if not hasattr(encoded, "latent_dist"):
        return None
    latents: Tensor = encoded.latent_dist.mean.float().cpu()
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def without_noise(scheduler: Any, prediction: Tensor, timestep: Any, noisy: Tensor) -> Tensor | None:
    """The latents that a prediction at a timestep points to; None for a scheduler of an unknown kind."""
    if prediction.shape != noisy.shape:
        return None
    prediction, noisy = prediction.float(), noisy.float()
    time = float(torch.as_tensor(timestep).flatten()[0])
    if "FlowMatch" in type(scheduler).__name__:
        return noisy - time / scheduler.config.num_train_timesteps * prediction
    powers = getattr(scheduler, "alphas_cumprod", None)
    if powers is None:
        return None
    power = float(powers[min(max(round(time), 0), len(powers) - 1)].clamp(min=1e-6))
    signal, noise = power**0.5, (1 - power) ** 0.5
    if float(scheduler.init_noise_sigma) != 1:  # it keeps latents at full size, and the noise grows
        noisy = noisy * signal
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return prediction
    return signal * noisy - noise * prediction if kind == "v_prediction" else (noisy - noise * prediction) / signal


def _coarse(height: int, width: int) -> tuple[int, int]:
    larger = max(height, width, _LARGEST_SIDE_UNCHECKED)
    return max(1, height * _LARGEST_SIDE_UNCHECKED // larger), max(1, width * _LARGEST_SIDE_UNCHECKED // larger)


def _with_ones(values: Tensor) -> Tensor:
    return torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
