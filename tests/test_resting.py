"""Models that no step reads leave the accelerator, and are back for samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_runs import short_run

from svft_diffusion.sampling.sample import generate
from svft_diffusion.training import resting, self_check, trainer, validation
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.dry_run import dry_run
from svft_diffusion.training.resting import RestingModels, resting_models
from svft_diffusion.training.step import optimizer_step

CUDA = torch.device("cuda")


class Movable(nn.Module):
    """Says where it was moved last, without moving."""

    place = "cuda"

    def to(self, device: Any) -> Movable:  # type: ignore[override]
        self.place = str(device)
        return self


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return replace(
        short_run(tmp_path), validation_prompt="a dog", num_validation_images=1, validation_steps=2, check_result=True
    )


def test_models_are_on_the_accelerator_for_the_time_of_samples() -> None:
    model = Movable()
    models = RestingModels([model], CUDA)
    with models.awake():  # before anything rests
        assert model.place == "cuda"
    assert model.place == "cuda"
    models.rest()
    assert model.place == "cpu"
    with pytest.raises(KeyboardInterrupt), models.awake():
        assert model.place == "cuda"
        raise KeyboardInterrupt
    assert model.place == "cpu"


def test_one_memory_for_all_moves_nothing() -> None:
    for device in ("cpu", "mps"):
        model = Movable()
        models = RestingModels([model], torch.device(device))
        models.rest()
        with models.awake():
            assert model.place == "cuda"


def test_models_that_can_not_be_moved_stay() -> None:
    quantized, placed = Movable(), Movable()
    vars(quantized)["hf_quantizer"] = vars(placed)["hf_device_map"] = {}
    RestingModels([quantized, placed], CUDA).rest()
    assert quantized.place == placed.place == "cuda"


@pytest.mark.parametrize(
    ("busy", "latents_cached", "expected"),
    [
        (["unet"], True, {"vae", "text_encoder", "safety_checker"}),
        (["unet", "text_encoder"], True, {"vae", "safety_checker"}),
        (["unet"], False, {"text_encoder", "safety_checker"}),
    ],
)
def test_what_steps_read_stays(busy: list[str], latents_cached: bool, expected: set[str]) -> None:
    components = {name: Movable() for name in ("unet", "vae", "text_encoder", "safety_checker")}
    others = {"tokenizer": object(), "feature_extractor": None}
    resting_models(components | others, busy, latents_cached=latents_cached, device=CUDA).rest()
    assert {name for name, model in components.items() if model.place == "cpu"} == expected


def _watched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[set[str]], list[str]]:
    """As on an accelerator: (the classes of models that rest, whether they do in each step and picture)."""
    moved: list[set[str]] = []
    seen: list[str] = []
    state = "here"

    def move(models: RestingModels, device: object) -> None:
        nonlocal state
        state = "away" if device == "cpu" else "here"
        moved.append({type(model).__name__ for model in models._models})

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.append(f"{name} {state}")
            return function(*args, **kwargs)

        return watched

    monkeypatch.setattr(resting, "_MEMORY_OF_THEIR_OWN", ("cpu",))
    monkeypatch.setattr(RestingModels, "_move", lambda models, device: move(models, "cpu" if device == "cpu" else ""))
    monkeypatch.setattr(trainer, "optimizer_step", watch("step", optimizer_step))
    monkeypatch.setattr(validation, "generate", watch("sample", generate))
    monkeypatch.setattr(self_check, "generate", watch("check", generate))
    return moved, seen


def test_a_run_rests_them_in_its_steps_alone(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, seen = _watched(monkeypatch)
    trainer.train(config)
    assert all(models == {"CLIPTextModel", "AutoencoderKL"} for models in moved)
    step, sample = "step away", "sample here"
    # The second picture of the check is that of a fresh base model.
    assert seen == [sample, step, step, sample, step, step, sample, "check here", "check away"]


def test_what_trains_does_not_rest(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, _ = _watched(monkeypatch)
    trainer.train(replace(config, train_text_encoder=True, validation_prompt=None, check_result=False))
    assert moved == [{"AutoencoderKL"}]


def test_pictures_that_are_cut_anew_keep_the_vae(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, _ = _watched(monkeypatch)
    trainer.train(replace(config, cache_latents=False, validation_prompt=None, check_result=False))
    assert moved == [{"CLIPTextModel"}]


def test_a_trial_draws_with_all_models(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    _watched(monkeypatch)
    places: list[bool] = []
    awake = RestingModels.awake

    def counted(models: RestingModels) -> Any:
        places.append(models._rests)
        return awake(models)

    monkeypatch.setattr(RestingModels, "awake", counted)
    dry_run(config)
    assert places == [True] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_a_run_on_an_accelerator_frees_their_memory(config: TrainingConfig) -> None:
    places: list[set[str]] = []

    def step(run: Any, *args: Any) -> Any:
        pipeline = run.family.pipeline
        places.append({pipeline.vae.device.type, pipeline.text_encoder.device.type})
        return optimizer_step(run, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", step)
        trainer.train(config)
    assert places == [{"cpu"}] * 4
