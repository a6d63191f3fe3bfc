"""Inpainting with any base of text to image: what is known is put back after every step.

Blended latent diffusion (Avrahami et al., SIGGRAPH 2023, arXiv 2206.02779): behind the mask, latents are those that the
denoiser made; elsewhere they are those of the picture, with as much noise as the next step expects. diffusers' own
pipelines do much the same, but refuse a U-Net that takes latents of other than four channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional

_CHANNELS_OF_DIFFUSERS = (4, 9)  # latents alone, or with a mask and the latents of what is known


def diffusers_inpaints(base: DiffusionPipeline) -> bool:
    """Whether diffusers' inpainting takes the base, as far as the channels of its latents tell."""
    unet = getattr(base, "unet", None)
    return unet is None or unet.config.in_channels in _CHANNELS_OF_DIFFUSERS


def cells_to_draw(mask: Image.Image, height: int, width: int) -> Tensor:
    """1 in each cell of the latents (1, 1, height, width) in which a mask (L) is white anywhere, else 0."""
    pixels = torch.from_numpy(np.array(mask, dtype=np.float32))[None, None]
    return (functional.adaptive_max_pool2d(pixels, (height, width)) > 0).float()


class KnownLatents:
    """Puts the known latents of a picture back while a pipeline draws; its ``callback_on_step_end``.

    Args:
        known: (1, C, H, W), without noise, scaled as the denoiser sees them.
        noise: standard normal, of the same shape.
        drawn: (1, 1, H, W), 1 where the denoiser draws, 0 where the picture is known.
    """

    def __init__(self, known: Tensor, noise: Tensor, drawn: Tensor) -> None:
        self._known, self._noise, self._drawn = known, noise, drawn

    def __call__(
        self, pipeline: DiffusionPipeline, step: int, _timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """``tensors`` with latents that are the picture's where it is known."""
        latents: Tensor = tensors["latents"]
        known = self._known.to(latents)
        timesteps = pipeline.scheduler.timesteps
        later = timesteps[len(timesteps) - pipeline.num_timesteps + step + 1 :]  # the pipeline may begin in the middle
        if len(later):
            known = pipeline.scheduler.add_noise(known, self._noise.to(latents), later[:1])
        drawn = self._drawn.to(latents)
        return {**tensors, "latents": drawn * latents + (1 - drawn) * known}
