"""DDIM inversion leads back to the picture, and spherical interpolation knows its corner cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from tiny_models import tiny_pipeline, tiny_pipeline_sdxl
from torch import Tensor

from svft_diffusion.editing.drawing import encoded
from svft_diffusion.evaluation.toy_subjects import demonstration_subject
from svft_diffusion.models.loading import load_pipeline
from svft_diffusion.sampling.inversion import ddim_scheduler, invert, scheduler_replaced, slerp, undo_ddim_step

PROMPT = "a photo of dog"


def rescheduled(pipeline: DiffusionPipeline, **settings: Any) -> DiffusionPipeline:
    """The pipeline with other settings of its scheduler."""
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **settings)
    return pipeline


def velocity_pipeline(**settings: Any) -> DiffusionPipeline:
    return rescheduled(tiny_pipeline(), prediction_type="v_prediction", **settings)


def random_latents() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def error_of_way_back(
    pipeline: DiffusionPipeline, latents: Tensor, steps: int, refinements: int, prompt: str = PROMPT
) -> float:
    """Distance of what is sampled from the noise found to the latents, relative to their size."""
    noise = invert(pipeline, latents, prompt, num_inference_steps=steps, refinements=refinements)
    height, width = (size * pipeline.vae_scale_factor for size in latents.shape[-2:])
    with scheduler_replaced(pipeline, ddim_scheduler(pipeline)):
        back = pipeline(
            prompt=prompt,
            latents=noise,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=1.0,
            eta=0.0,
            output_type="latent",
        ).images
    return float((back - latents).norm() / latents.norm())


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_pipeline_sdxl])
def test_noise_prediction_is_inverted(make: Any) -> None:
    pipeline, latents = make(), random_latents()
    plain = error_of_way_back(pipeline, latents, steps=10, refinements=0)
    assert error_of_way_back(pipeline, latents, steps=10, refinements=30) < 1e-3 < plain


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        {"timestep_spacing": "leading", "set_alpha_to_one": False, "steps_offset": 1},
    ],
)
def test_velocity_prediction_is_inverted_with_every_timeline(settings: dict[str, Any]) -> None:
    assert error_of_way_back(velocity_pipeline(**settings), random_latents(), steps=7, refinements=8) < 1e-5


def test_picture_of_the_embedded_model_is_found_again() -> None:
    pipeline = load_pipeline("toybox")
    pipeline.set_progress_bar_config(disable=True)
    subject = demonstration_subject()
    latents = encoded(pipeline, subject.photos()[0])
    prompt = subject.class_prompt
    errors = [error_of_way_back(pipeline, latents, steps=20, refinements=number, prompt=prompt) for number in (0, 3)]
    assert errors[1] < 0.01 < errors[0] < 0.1


def test_half_precision_is_kept() -> None:
    pipeline = velocity_pipeline().to(torch.bfloat16)
    noise = invert(pipeline, random_latents().bfloat16(), PROMPT, num_inference_steps=5, refinements=1)
    assert noise.dtype == torch.bfloat16 and noise.isfinite().all()


def test_pipeline_has_its_own_scheduler_again() -> None:
    pipeline = tiny_pipeline()
    before = pipeline.scheduler
    looks: list[int] = []
    invert(pipeline, random_latents(), PROMPT, num_inference_steps=2, refinements=1, on_step=looks.append)
    assert pipeline.scheduler is before and looks == [1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError), scheduler_replaced(pipeline, ddim_scheduler(pipeline)):
        assert pipeline.scheduler is not before
        _ = 1 / 0
    assert pipeline.scheduler is before


def test_latents_are_not_clipped() -> None:
    assert not ddim_scheduler(tiny_pipeline()).config.clip_sample


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timestep", [0, 1, 381, 981])
def test_step_is_undone(prediction_type: str, timestep: int) -> None:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(50)
    before, prediction = random_latents(), random_latents().flip(-1)
    after = scheduler.step(prediction, timestep, before).prev_sample
    alpha_bar_after = scheduler.alphas_cumprod[timestep - 20] if timestep >= 20 else torch.tensor(1.0)
    found = undo_ddim_step(
        after,
        prediction,
        alpha_bar=float(scheduler.alphas_cumprod[timestep]),
        alpha_bar_after=float(alpha_bar_after),
        prediction_type=prediction_type,
    )
    assert torch.allclose(found, before, atol=1e-5)


def test_slerp_is_the_formula_of_the_paper() -> None:
    start, end = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2)).double().unbind()
    cosine = float((start * end).sum() / start.norm() / end.norm())
    angle = math.acos(cosine)
    expected = (math.sin(0.7 * angle) * start + math.sin(0.3 * angle) * end) / math.sin(angle)
    assert torch.allclose(slerp(0.3, start, end), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_slerp_begins_and_ends_where_it_should(dtype: torch.dtype) -> None:
    start, end = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(3)).to(dtype).unbind()
    for alpha, expected in ((0.0, start), (1.0, end)):
        mixed = slerp(alpha, start, end)
        assert mixed.dtype == dtype
        assert torch.allclose(mixed.float(), expected.float(), atol=1e-6)


def test_slerp_of_parallel_vectors_is_linear() -> None:
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(slerp(0.25, start, 3 * start), 1.5 * start)
    assert torch.equal(slerp(0.5, start, start), start)


def test_slerp_of_opposite_vectors_keeps_the_length() -> None:
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(5))
    middle = slerp(0.5, start, -start)
    assert torch.allclose(middle.norm(), start.norm()) and abs(float((middle * start).sum())) < 1e-4
    assert torch.equal(middle, slerp(0.5, start, -start))
    assert torch.allclose(slerp(1.0, start, -start), -start, atol=1e-5)


def test_slerp_with_zero_is_linear() -> None:
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(6))
    assert torch.allclose(slerp(0.25, start, torch.zeros_like(start)), 0.75 * start)
