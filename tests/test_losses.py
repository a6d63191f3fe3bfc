"""Weights, thresholds and noise of the objective: each formula against numbers worked out here, then in a run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_pipeline
from torch import Tensor
from training_runs import PROMPT, short_run, trained_tensors

from svft_diffusion.errors import UserError
from svft_diffusion.models import LatentDistribution, family_of
from svft_diffusion.training.checks import check_settings
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.losses import LossSettings, elementwise_loss, huber_threshold, min_snr_weight, squared_norm
from svft_diffusion.training.objective import Losses, Randomness, denoising_losses, draw_randomness
from svft_diffusion.training.trainer import train

TIMESTEPS = [900, 30, 5, 700]  # two photos and two class pictures, of noise levels that are weighed differently


def family(prediction_type: str) -> Any:
    pipeline = tiny_pipeline()
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, prediction_type=prediction_type
    )
    return family_of(pipeline)


def losses_of(model: Any, timesteps: list[int], prior_loss_weight: float | None, settings: LossSettings) -> Losses:
    number = len(timesteps)
    generator = torch.Generator().manual_seed(3)
    latents, noise = torch.randn((2, number, 4, 8, 6), generator=generator)
    with torch.no_grad():
        conditioning = model.encode_prompts(model.token_ids([PROMPT] * number))
        return denoising_losses(
            model,
            LatentDistribution(latents, torch.zeros_like(latents)),
            conditioning,
            Randomness(noise, noise, torch.tensor(timesteps)),
            prior_loss_weight=prior_loss_weight,
            settings=settings,
        )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("photos", [1, 2])
def test_min_snr_weighs_every_sample_by_its_own_noise(prediction_type: str, photos: int) -> None:
    model = family(prediction_type)
    timesteps = TIMESTEPS[:photos] + TIMESTEPS[2 : 2 + photos]
    losses = losses_of(model, timesteps, 0.25, LossSettings(snr_gamma=5.0))
    plain = losses_of(model, timesteps, 0.25, LossSettings())
    assert torch.equal(losses.samples, plain.samples) and losses.samples.shape == (2 * photos,)

    signal = model.pipeline.scheduler.alphas_cumprod[timesteps].double()
    snr = signal / (1 - signal)
    weights = torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction_type == "epsilon" else snr + 1)
    weighted = losses.samples.double() * weights
    instance, prior = weighted[:photos].mean(), weighted[photos:].mean()
    assert losses.prior is not None
    torch.testing.assert_close(losses.instance.double(), instance, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.prior.double(), prior, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.total.double(), instance + 0.25 * prior, rtol=1e-4, atol=0)
    assert weights.max() / weights.min() > 1.5, "these noise levels do not tell right from wrong"


def test_min_snr_weights_of_the_paper() -> None:
    snr = torch.tensor([0.0, 1.0, 5.0, 25.0])
    assert min_snr_weight(snr, 5.0, "epsilon").tolist() == pytest.approx([1, 1, 1, 0.2])
    assert min_snr_weight(snr, 5.0, "v_prediction").tolist() == pytest.approx([0, 1 / 2, 5 / 6, 5 / 26])


def test_pseudo_huber_is_squared_where_errors_are_small_and_linear_where_they_are_large() -> None:
    error = torch.tensor([[1e-3, 0.5], [30.0, -30.0]])
    c = torch.tensor([0.5, 2.0])
    huber = elementwise_loss(error, torch.zeros(2, 2), "huber", c)
    smooth = elementwise_loss(error, torch.zeros(2, 2), "smooth_l1", c)
    expected = [[2 * h * (math.hypot(float(e), h) - h) for e in row] for row, h in zip(error, c.tolist(), strict=True)]
    torch.testing.assert_close(huber, torch.tensor(expected), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(huber, smooth * c[:, None])
    assert float(huber[0, 0]) == pytest.approx(1e-6, rel=1e-4)
    assert smooth[1].tolist() == pytest.approx([60, 60], rel=0.1)
    assert torch.equal(elementwise_loss(error, torch.zeros(2, 2), "l2", None), error**2)


def test_huber_thresholds_go_from_one_to_huber_c() -> None:
    timesteps, snr = torch.tensor([0, 500, 1000]), torch.tensor([1e12, 1.0, 1e-12])
    expected = {"constant": [0.1, 0.1, 0.1], "exponential": [1, math.sqrt(0.1), 0.1], "snr": [1, 0.9 / 4 + 0.1, 0.1]}
    for schedule, values in expected.items():
        settings = LossSettings("huber", 0.1, schedule)
        assert huber_threshold(timesteps, snr, settings, 1000).tolist() == pytest.approx(values, rel=1e-4), schedule


def test_each_sample_has_the_threshold_of_its_noise() -> None:
    model = family("epsilon")
    settings = LossSettings("huber", 0.1, "exponential")
    together = losses_of(model, TIMESTEPS, None, settings)
    constant = losses_of(model, TIMESTEPS, None, LossSettings("huber", 0.1 ** (TIMESTEPS[1] / 1000), "constant"))
    assert together.samples[1].item() == pytest.approx(constant.samples[1].item(), rel=1e-5)
    assert together.samples[0].item() < 0.9 * constant.samples[0].item()


def draw(samples: list[tuple[str, int]], **options: float) -> Randomness:
    return draw_randomness(
        5, samples, torch.zeros(1, 4, 8, 6), timestep_sampling="uniform", number_of_timesteps=1000, **options
    )


def test_noise_offset_is_constant_over_a_channel_and_belongs_to_the_sample() -> None:
    plain, offset = (draw([("instance", 7), ("class", 7)], noise_offset=share) for share in (0.0, 0.5))
    difference = offset.noise - plain.noise
    assert (difference.std(dim=(2, 3)) < 1e-6).all() and difference.mean(dim=(2, 3)).unique().numel() == 8
    assert torch.equal(offset.timesteps, plain.timesteps) and torch.equal(offset.posterior_noise, plain.posterior_noise)
    assert torch.equal(draw([("class", 7)], noise_offset=0.5).noise[0], offset.noise[1])


def test_input_perturbation_is_in_the_input_and_not_in_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, perturbed = (draw([("instance", 7), ("class", 7)], input_perturbation=share) for share in (0.0, 0.25))
    assert plain.perturbed_noise is None and perturbed.perturbed_noise is not None
    assert torch.equal(perturbed.noise, plain.noise) and torch.equal(perturbed.timesteps, plain.timesteps)
    second = (perturbed.perturbed_noise - perturbed.noise) / 0.25
    assert 0.8 < second.std() < 1.2
    assert abs(torch.corrcoef(torch.stack((second.flatten(), plain.noise.flatten())))[0, 1]) < 0.2
    alone = draw([("class", 7)], input_perturbation=0.25).perturbed_noise
    assert alone is not None and torch.equal(alone[0], perturbed.perturbed_noise[1])

    model = family("v_prediction")
    seen: dict[str, Tensor] = {}
    for name in ("add_noise", "target"):
        monkeypatch.setattr(model, name, _remembering(getattr(model, name), name, seen))
    latents = torch.zeros(2, 4, 8, 6)
    with torch.no_grad():
        conditioning = model.encode_prompts(model.token_ids([PROMPT] * 2))
        denoising_losses(model, LatentDistribution(latents, latents), conditioning, perturbed, prior_loss_weight=None)
    assert torch.equal(seen["target"], perturbed.noise) and torch.equal(seen["add_noise"], perturbed.perturbed_noise)


def _remembering(function: Any, name: str, seen: dict[str, Tensor]) -> Any:
    def call(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Any:
        seen[name] = noise
        return function(latents, noise, timesteps)

    return call


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return short_run(tmp_path)


def test_value_norm_penalty_pulls_towards_the_base(config: TrainingConfig, tmp_path: Path) -> None:
    free = train(config)
    bound = train(replace(config, value_norm_penalty=1.0, output_dir=tmp_path / "bound"))
    norms = [float(squared_norm(trained_tensors(result.adapter).values())) for result in (free, bound)]
    assert norms[1] < 0.5 * norms[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"snr_gamma": 0.01},
        {"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.2},
        {"loss_type": "smooth_l1"},
        {"noise_offset": 0.1},
        {"input_perturbation": 0.1},
    ],
)
def test_every_option_changes_what_a_run_learns(
    config: TrainingConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = replace(config, max_train_steps=1)
    plain = trained_tensors(train(config).adapter)
    other = trained_tensors(train(replace(config, output_dir=tmp_path / "other", **changes)).adapter)
    assert any(not torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snr_gamma": 0.0}, "--snr_gamma must be above 0"),
        ({"huber_c": 0.2}, "--huber_c has no effect without --loss_type huber or smooth_l1"),
        ({"huber_schedule": "constant"}, "--huber_schedule has no effect"),
        ({"huber_c": 1.5, "loss_type": "huber"}, "--huber_c must be at most 1"),
        ({"noise_offset": -0.1}, "--noise_offset must be 0 or more"),
        ({"input_perturbation": float("nan")}, "--input_perturbation must be a finite number"),
        ({"value_norm_penalty": -1.0}, "--value_norm_penalty must be 0 or more"),
        ({"loss_type": "l1"}, "'l1' is not one of l2, huber, smooth_l1"),
    ],
)
def test_settings_that_can_not_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(replace(TrainingConfig(), **changes))
