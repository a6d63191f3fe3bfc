"""What can't be drawn: more steps than a scheduler has, and what a failed picture leaves for the next one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_models import tiny_pipeline, tiny_pipeline_sdxl

from svft_diffusion.errors import UserError
from svft_diffusion.sampling.drawing import generate, generate_batch
from svft_diffusion.sampling.schedulers import SCHEDULERS, check_steps, make_scheduler


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.startswith("flow")])
def test_the_most_steps_that_are_let_through_have_a_place(name: str) -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    scheduler = make_scheduler(pipeline, name)
    most = 50 if name in ("lcm", "tcd") else 999
    check_steps(scheduler, most)
    scheduler.set_timesteps(most)
    timesteps = scheduler.timesteps.double()
    assert timesteps.isfinite().all() and timesteps.min() >= 0 and timesteps.max() <= 999
    assert getattr(scheduler, "sigmas", timesteps).isfinite().all()
    with pytest.raises(UserError, match=f"at most {most} steps, got {most + 1}"):
        check_steps(scheduler, most + 1)


def test_schedulers_of_flows_take_a_thousand_steps() -> None:
    check_steps(FlowMatchEulerDiscreteScheduler(), 1000)


def test_a_picture_that_fails_in_decoding_leaves_the_next_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline_sdxl().to(torch.float16)
    pipeline.vae.register_to_config(force_upcast=True)
    settings: dict[str, Any] = {"seed": 0, "num_inference_steps": 1, "height": 16, "width": 16}
    before = generate(pipeline, "a dog", **settings)

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("too large")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(pipeline.vae, "decode", fails)
        generate_batch(pipeline, "a dog", seeds=[0], num_inference_steps=1, height=16, width=16)
    assert generate(pipeline, "a dog", **settings).tobytes() == before.tobytes()
