"""Noisy latents and targets against diffusers' schedulers: what is learned exactly is what samplers draw from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from svft_diffusion.models.noise import DiffusionSchedule, FlowSchedule, NoiseSchedule

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAMPLERS: dict[str, Callable[..., Any]] = {
    "ddim": partial(DDIMScheduler, clip_sample=False),  # as Stable Diffusion has it
    "dpm": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}
KINDS: dict[str, dict[str, Any]] = {
    "epsilon": {"prediction_type": "epsilon"},
    "velocity": {"prediction_type": "v_prediction"},
    "velocity, noise at the end": {
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    },
}  # fmt: skip
FLOWS: dict[str, dict[str, Any]] = {
    "plain": {"shift": 1.0}, "sd3": {"shift": 3.0}, "flux": {"shift": 3.0, "use_dynamic_shifting": True},
}  # fmt: skip


def some_latents() -> tuple[Tensor, Tensor]:
    latents, noise = torch.randn((2, 3, 4, 6, 5), generator=torch.Generator().manual_seed(0))
    return latents, noise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_and_target_of_diffusion_are_those_of_the_training_scheduler(sampler: str, kind: str) -> None:
    options = BETAS | KINDS[kind]
    schedule, reference = DiffusionSchedule(SAMPLERS[sampler](**options)), DDPMScheduler(**options)
    latents, noise = some_latents()
    timesteps = torch.tensor([0, 431, 999])
    assert torch.equal(schedule.add_noise(latents, noise, timesteps), reference.add_noise(latents, noise, timesteps))
    expected = noise if kind == "epsilon" else reference.get_velocity(latents, noise, timesteps)
    assert torch.equal(schedule.target(latents, noise, timesteps), expected)
    assert (float(schedule.signal_to_noise(timesteps)[2]) == 0) == ("at the end" in kind)


@pytest.mark.parametrize("flow", FLOWS)
def test_noise_of_flows_is_that_of_the_scheduler(flow: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**FLOWS[flow])
    schedule = FlowSchedule(scheduler)
    latents, noise = some_latents()
    timesteps = torch.tensor([0, 431, 999])
    of_scheduler = scheduler.timesteps[999 - timesteps]  # its table goes the other way
    expected = scheduler.scale_noise(latents, of_scheduler, noise)
    torch.testing.assert_close(schedule.add_noise(latents, noise, timesteps), expected)
    torch.testing.assert_close(schedule.sigmas(timesteps) * 1000, of_scheduler)


def drawn(scheduler: Any, answer: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Tensor:
    """What a sampler makes of noise with a denoiser that gives ``answer`` to noisy latents and timestep."""
    scheduler.set_timesteps(12, **options)
    _, sample = some_latents()
    sample = sample * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(answer(noisy, timestep), timestep, sample).prev_sample
    return sample


def target_for(schedule: NoiseSchedule, latents: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
    """What a denoiser that knows the latents answers: the target, for the noise that must be in the noisy ones."""
    timesteps = timestep.long().expand(len(latents))
    zeros, ones = torch.zeros_like(latents), torch.ones_like(latents)
    noise = (noisy - schedule.add_noise(latents, zeros, timesteps)) / schedule.add_noise(zeros, ones, timesteps)
    return schedule.target(latents, noise, timesteps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exact_answers_of_diffusion_draw_the_picture(sampler: str, kind: str) -> None:
    scheduler = SAMPLERS[sampler](**BETAS, **KINDS[kind])
    schedule = DiffusionSchedule(scheduler)
    latents, _ = some_latents()
    picture = drawn(scheduler, lambda noisy, timestep: target_for(schedule, latents, noisy, timestep))
    torch.testing.assert_close(picture, latents, rtol=0, atol=2e-3)


@pytest.mark.parametrize("flow", FLOWS)
def test_exact_answers_of_flows_draw_the_picture(flow: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**FLOWS[flow])
    schedule = FlowSchedule(scheduler)
    latents, _ = some_latents()

    def answer(noisy: Tensor, timestep: Tensor) -> Tensor:
        sigma = timestep / 1000
        noise = (noisy - (1 - sigma) * latents) / sigma
        return schedule.target(latents, noise, timestep.long().expand(3))

    picture = drawn(scheduler, answer, **({"mu": 0.8} if flow == "flux" else {}))
    torch.testing.assert_close(picture, latents, rtol=0, atol=1e-4)
