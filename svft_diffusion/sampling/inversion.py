"""DDIM inversion: the noise from which a base model draws a given picture, and mixing it with new noise.

A step of DDIM without noise of its own (Song et al. 2021, arXiv 2010.02502, eq. 12) takes latents x_t to x_s, s < t:

    x_s = a_s (x_t - s_t e) / a_t + s_s e,    e = model(x_t, t),    a = sqrt(alpha bar), s = sqrt(1 - alpha bar)

Given what the model answers, that is solved for x_t exactly; only the answer is not known, because x_t is what is
looked for. Plain inversion takes model(x_s, t). Here x_t is then put in its place again and again, a fixed point
iteration, so that sampling from the result takes the same steps back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor

DEFAULT_REFINEMENTS = 3


def ddim_scheduler(pipeline: DiffusionPipeline) -> DDIMScheduler:
    """DDIM with the noise levels, the timesteps and the kind of prediction of the base's own scheduler.

    It never clips, which is its default where the base's settings are silent, and is meant for pixels, not for latents.
    """
    return DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, thresholding=False)


@contextmanager
def scheduler_replaced(pipeline: DiffusionPipeline, scheduler: DDIMScheduler) -> Iterator[None]:
    """Within the context, the pipeline draws with another scheduler."""
    before = pipeline.scheduler
    pipeline.scheduler = scheduler
    try:
        yield
    finally:
        pipeline.scheduler = before


def invert(
    pipeline: DiffusionPipeline,
    latents: Tensor,
    prompt: str,
    *,
    num_inference_steps: int = 50,
    refinements: int = DEFAULT_REFINEMENTS,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """The noise from which DDIM (`ddim_scheduler`, eta 0, guidance 1, as many steps) draws ``latents``.

    Args:
        pipeline: of a base that predicts noise or velocity, with its adapters at the wanted weights.
        latents: (1, C, H, W), scaled as the denoiser sees them.
        refinements: how often the answer of the denoiser is asked for again at what was found; 0 is plain DDIM
            inversion. Each costs what a step costs.
        on_step: called with the number of times that the denoiser has run.
    """

    def report(_pipeline: DiffusionPipeline, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1)
        return tensors

    backwards = _InverseDDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, thresholding=False)
    backwards.refinements = refinements
    height, width = (size * pipeline.vae_scale_factor for size in latents.shape[-2:])
    pipeline.set_progress_bar_config(disable=True)
    with scheduler_replaced(pipeline, backwards):
        noise: Tensor = pipeline(
            prompt=prompt,
            latents=latents,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=1.0,
            output_type="latent",
            callback_on_step_end=report,
        ).images
    return noise


def slerp(alpha: float, start: Tensor, end: Tensor) -> Tensor:
    """Spherical interpolation, all elements of a tensor taken as one vector: ``start`` at 0, ``end`` at 1.

    ``sin((1 - alpha) phi) / sin(phi) start + sin(alpha phi) / sin(phi) end`` with the angle ``phi`` between them
    (SVDiff, Han et al. 2023, eq. 7). For parallel vectors, and where one is zero, that becomes linear interpolation.
    Between opposite ones no way is the shortest: it goes through a direction at right angles to both, the same each
    time.
    """
    first, second = start.float(), end.float()
    lengths = first.norm(), second.norm()
    if lengths[0] == 0 or lengths[1] == 0:
        return torch.lerp(first, second, alpha).to(start.dtype)
    one, other = first / lengths[0], second / lengths[1]
    # Exact for small and for flat angles too, where the arc cosine loses half of the digits.
    angle = 2.0 * math.atan2(float((one - other).norm()), float((one + other).norm()))
    if angle < _PARALLEL:
        return torch.lerp(first, second, alpha).to(start.dtype)
    if math.pi - angle < _PARALLEL:
        length = torch.lerp(lengths[0], lengths[1], alpha)
        across = math.cos(alpha * math.pi) * one + math.sin(alpha * math.pi) * _perpendicular(one)
        return (length * across).to(start.dtype)
    mixed = math.sin((1.0 - alpha) * angle) * first + math.sin(alpha * angle) * second
    return (mixed / math.sin(angle)).to(start.dtype)


_PARALLEL = 1e-4
"""Radians; below, float32 can't tell the two formulas apart."""


def _perpendicular(unit: Tensor) -> Tensor:
    """A unit vector at right angles to another one of at least two elements."""
    axis = torch.zeros_like(unit)
    axis.view(-1)[unit.abs().argmin()] = 1.0
    rest = axis - (axis * unit).sum() * unit
    return rest / rest.norm()


class _InverseDDIMScheduler(DDIMScheduler):
    """Takes the steps of `DDIMScheduler` back, from the last one to the first, for a pipeline that means to sample.

    diffusers' own DDIMInverseScheduler is no exact inverse: it reads a velocity at the noise level before the step,
    knows no "linspace", and with "trailing" rounds the steps differently from DDIMScheduler. It can't look twice.
    """

    refinements = 0

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Those of sampling in reverse, each as often as the denoiser looks at it."""
        super().set_timesteps(num_inference_steps, device)
        looks = self.refinements + 1
        self.timesteps: Tensor = self.timesteps.flip(0).repeat_interleave(looks)
        self.order = looks
        self._looks = 0
        self._before_step: Tensor | None = None

    def step(  # no noise is drawn on the way back
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        """What a step of sampling at ``timestep`` makes the latents of, if the denoiser says ``model_output`` there."""
        if self._looks % (self.refinements + 1) == 0:
            self._before_step = sample.float()
        self._looks += 1
        assert self._before_step is not None
        found = undo_ddim_step(
            self._before_step,
            model_output.float(),
            alpha_bar=float(self.alphas_cumprod[int(timestep)]),
            alpha_bar_after=self._alpha_bar_after(int(timestep)),
            prediction_type=self.config.prediction_type,
        )
        return (found.to(sample.dtype),)

    def _alpha_bar_after(self, timestep: int) -> float:
        """That of the latents which `DDIMScheduler.step` makes at ``timestep``."""
        after = timestep - self.config.num_train_timesteps // self.num_inference_steps
        return float(self.alphas_cumprod[after] if after >= 0 else self.final_alpha_cumprod)


def undo_ddim_step(
    latents: Tensor, prediction: Tensor, *, alpha_bar: float, alpha_bar_after: float, prediction_type: str
) -> Tensor:
    """The latents of which a DDIM step without noise makes ``latents``.

    Args:
        prediction: what the denoiser says of the result; shape of ``latents``.
        alpha_bar: signal power of the result.
        alpha_bar_after: signal power of ``latents``, which have less noise.
        prediction_type: ``epsilon`` or ``v_prediction``.
    """
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
    signal_after, noise_after = math.sqrt(alpha_bar_after), math.sqrt(1.0 - alpha_bar_after)
    if prediction_type == "epsilon":
        return signal / signal_after * (latents - noise_after * prediction) + noise * prediction
    # With velocity v, x_0 = a x_t - s v and e = a v + s x_t: the step is a rotation, well defined without signal too.
    return (latents - (noise_after * signal - signal_after * noise) * prediction) / (
        signal_after * signal + noise_after * noise
    )
