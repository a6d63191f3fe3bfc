"""Previews of what is being drawn."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from PIL import Image
from tiny_models import tiny_pipeline, tiny_vae

from svft_diffusion.app.drawing.preview import Previews, without_noise
from svft_diffusion.sampling.drawing import generate, open_pipeline
from svft_diffusion.sampling.schedulers import make_scheduler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_a_right_prediction_points_to_the_picture(kind: Any, prediction_type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    picture, noise = (torch.randn(1, 4, 6, 10, generator=generator) for _ in range(2))
    scheduler = kind(prediction_type=prediction_type, timestep_spacing="leading")
    scheduler.set_timesteps(20)
    for timestep in scheduler.timesteps[[0, 9, -1]]:
        noisy = scheduler.add_noise(picture, noise, timestep[None])
        power = scheduler.alphas_cumprod[int(timestep)]
        velocity = power**0.5 * noise - (1 - power) ** 0.5 * picture
        prediction = {"epsilon": noise, "v_prediction": velocity, "sample": picture}[prediction_type]
        found = without_noise(scheduler, prediction, timestep, noisy)
        assert found is not None
        torch.testing.assert_close(found, picture, atol=2e-3, rtol=0)


def test_a_right_velocity_of_a_flow_points_to_the_picture() -> None:
    generator = torch.Generator().manual_seed(0)
    picture, noise = (torch.randn(1, 16, 6, 10, generator=generator) for _ in range(2))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(20)
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        noisy = (1 - sigma) * picture + sigma * noise
        found = without_noise(scheduler, (noise - picture).half(), timestep, noisy.half())
        assert found is not None
        torch.testing.assert_close(found, picture, atol=1e-2, rtol=0)


def test_what_cannot_be_told_is_none() -> None:
    latents = torch.zeros(1, 4, 8, 8)
    assert without_noise(SimpleNamespace(), latents, 1, latents) is None
    assert without_noise(DDIMScheduler(), torch.zeros(1, 8, 8, 8), 1, latents) is None
    pipe = tiny_pipeline()
    previews = Previews(pipe)
    with previews.following(pipe) as preview:
        assert preview() is None
        pipe.scheduler.set_timesteps(2)
        packed = torch.zeros(1, 64, 16)  # as Flux has
        pipe.scheduler.step(packed, pipe.scheduler.timesteps[0], packed)
        assert preview() is None


def test_a_vae_of_another_kind_has_no_preview() -> None:
    pipe, blocks = tiny_pipeline(), {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    pipe.vae = AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    pipe.scheduler.set_timesteps(2)
    latents = torch.zeros(1, 4, 8, 8)
    with Previews(pipe).following(pipe) as preview:
        pipe.scheduler.step(latents, pipe.scheduler.timesteps[0], latents)
        assert preview() is None


@pytest.mark.parametrize("scheduler", ["default", "euler_a", "lcm"])
def test_previews_resemble_the_picture(scheduler: str) -> None:
    pipe = open_pipeline("toybox", device=torch.device("cpu"))
    pipe.scheduler = make_scheduler(pipe, scheduler)
    own_step = pipe.scheduler.step
    shown: list[Image.Image | None] = []
    with Previews(pipe).following(pipe) as preview:
        image = generate(
            pipe,
            "a photo of a red robot on the beach",
            seed=3,
            num_inference_steps=4,
            on_step=lambda step: shown.append(preview()),
        )
    assert pipe.scheduler.step == own_step
    assert all(one is not None and one.size == image.size for one in shown)
    alike = [_explained(one, image) for one in shown if one is not None]
    assert len(alike) == 4 and alike[-1] > 0.8 and alike[2] > 0.5, alike


def _explained(preview: Image.Image, image: Image.Image) -> float:
    """Part of the variance of a picture's patches that a preview tells."""
    found, wanted = (
        np.asarray(one.convert("RGB").resize((16, 16), Image.Resampling.BOX), dtype=float) for one in (preview, image)
    )
    return float(1 - ((found - wanted) ** 2).sum() / ((wanted - wanted.mean((0, 1))) ** 2).sum())


def test_fitting_leaves_the_vae_and_the_random_numbers_alone() -> None:
    pipe = tiny_pipeline()
    pipe.vae = tiny_vae(force_upcast=True).half()
    before = _digest(pipe.vae)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Previews(pipe)
    assert torch.equal(torch.rand(1), expected)
    assert _digest(pipe.vae) == before and pipe.vae.dtype == torch.float16


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(str(tensor.dtype).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_with_a_safety_checker_previews_show_colours_alone() -> None:
    pipe = tiny_pipeline()
    latents = torch.randn(1, 4, 64, 32, generator=torch.Generator().manual_seed(0))
    pictures = []
    for checker in (None, object()):
        pipe.safety_checker = checker
        pipe.scheduler.set_timesteps(4)
        with Previews(pipe).following(pipe) as preview:
            pipe.scheduler.step(torch.zeros_like(latents), pipe.scheduler.timesteps[0], latents)
            picture = preview()
        assert picture is not None and picture.width * 2 == picture.height
        pictures.append(picture)
    assert pictures[0].size == (64, 128)
    assert pictures[1].size == (16, 32)
