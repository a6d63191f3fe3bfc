"""Runs in which something is no finite number any more, and the trial of the result."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_never_losing import status_of
from training_runs import FREEZING, checkpoints, short_run

from svft_diffusion.data.cutting import Cutter
from svft_diffusion.training import self_check, setup, step, trainer
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.failure import _settings_without_folders
from svft_diffusion.training.finite import TrainingDiverged
from svft_diffusion.training.metrics import read_metrics
from svft_diffusion.training.prompts import PromptTable
from svft_diffusion.training.trainer import train


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return short_run(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_latents_that_are_not_finite(config: TrainingConfig, value: float) -> None:
    real = Cutter.cut

    def cut(cutter: Cutter, picture: Any, variant: int, *rest: Any, **options: Any) -> Any:
        made = real(cutter, picture, variant, *rest, **options)
        if picture.path.name == "3.png":
            made.pixels[0, 0, 0] = value
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cutter, "cut", cut)
        message = r"pixels or latents are not finite in step \d.*pictures: 3\.png; "
        with pytest.raises(TrainingDiverged, match=message) as stop:
            train(replace(config, checkpointing_steps=1))
    assert stop.value.files == ["3.png"]
    assert_nothing_broken_was_saved(config)


def test_text_that_is_not_finite(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PromptTable.conditioning
    calls: list[int] = []

    def conditioning(table: PromptTable, prompts: Any) -> Any:
        calls.append(1)
        encoded = real(table, prompts)
        return {name: tensor * math.inf for name, tensor in encoded.items()} if len(calls) == 3 else encoded

    monkeypatch.setattr(PromptTable, "conditioning", conditioning)
    with pytest.raises(TrainingDiverged, match="what the text encoder says is not finite in step 3"):
        train(config)
    assert_nothing_broken_was_saved(config)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    real = step.denoising_losses
    calls: list[int] = []

    def broken(*positional: Any, **named: Any) -> Any:
        calls.append(1)
        losses = real(*positional, **named)
        return replace(losses, total=losses.total * value) if len(calls) == 6 else losses

    monkeypatch.setattr(step, "denoising_losses", broken)
    with pytest.raises(TrainingDiverged, match=r"in step 3.*the last good checkpoint is checkpoint-2") as stop:
        train(replace(config, gradient_accumulation_steps=2))
    # Only those of the forward pass that went wrong, the second of the step.
    assert len(stop.value.files) == 2 and "\n" not in str(stop.value)
    assert checkpoints(config.output_dir) == {"checkpoint-2"}
    assert_nothing_broken_was_saved(config)
    report = json.loads((config.output_dir / "failure_report.json").read_text(encoding="utf-8"))
    assert report["files"] == stop.value.files and report["last_good_checkpoint"] == "checkpoint-2"
    assert report["finished_steps"] == 2 and len(report["last_losses"]) == 2
    assert report["settings"]["learning_rate"] == 0.05 and report["settings"]["output_dir"] == "out"
    assert {"python", "torch", "diffusers"} <= report["versions"].keys()
    assert str(config.output_dir.parent) not in json.dumps(report)
    monkeypatch.undo()
    resumed = replace(config, gradient_accumulation_steps=2, resume_from_checkpoint="checkpoint-2")
    assert train(resumed).steps == 4 and not (config.output_dir / "failure_report.json").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradient_and_values_that_are_not_finite(config: TrainingConfig, tmp_path: Path, value: float) -> None:
    def break_gradient(optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        first = optimizer.param_groups[0]["params"][0]
        first.grad.flatten()[0] = value

    def break_value(optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        optimizer.param_groups[0]["params"][0].data.flatten()[0] = value

    real = step._average_gradients

    def average(run: Any) -> None:
        real(run)
        if run.finished_steps == 2:
            break_gradient(run.optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_average_gradients", average)
        with pytest.raises(TrainingDiverged, match="the gradient's norm is no finite number in step 3"):
            train(config)
    assert_nothing_broken_was_saved(config)
    values = replace(config, output_dir=tmp_path / "values")
    real_step = torch.optim.AdamW.step
    calls: list[int] = []

    def optimizer_step(optimizer: torch.optim.AdamW, *rest: Any, **named: Any) -> Any:
        done = real_step(optimizer, *rest, **named)
        calls.append(1)
        if len(calls) == 3:
            break_value(optimizer)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", optimizer_step)
        with pytest.raises(TrainingDiverged, match="the norm of the trained values is no finite number in step 3"):
            train(values)
    assert_nothing_broken_was_saved(values)


def assert_nothing_broken_was_saved(config: TrainingConfig) -> None:
    files = list(config.output_dir.rglob("*.safetensors"))
    for file in files:
        for name, tensor in load_file(file).items():
            assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), (file, name)
    assert not (config.output_dir / "adapter.safetensors").exists()
    assert status_of(config)["state"] == "failed"


def test_gradient_that_overflows_at_every_scale(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fp16's scaler leaves out is normal; that all of them are left out is none."""
    real_accelerator, real = setup.make_accelerator, step._average_gradients

    def make_accelerator(settings: TrainingConfig) -> Any:
        accelerator = real_accelerator(settings)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)
        return accelerator

    def average(run: Any) -> None:
        real(run)
        if run.finished_steps != 2:
            run.optimizer.param_groups[0]["params"][0].grad.flatten()[0] = math.inf

    monkeypatch.setattr(trainer, "make_accelerator", make_accelerator)
    monkeypatch.setattr(step, "_average_gradients", average)
    with pytest.raises(TrainingDiverged, match="the gradient's norm is no finite number in step 16"):
        train(replace(config, max_train_steps=20, history_steps=0, checkpointing_steps=100))
    rows = read_metrics(config.output_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["gradient_norm"] is not None] == [3]


# The result


def test_result_is_tried_in_a_fresh_base_model(
    config: TrainingConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replace(config, max_train_steps=1, history_steps=0)
    train(replace(one, check_result=True, train_text_encoder=True, **FREEZING))
    assert "adapter.safetensors draws the same picture as the trained model" in capsys.readouterr().out
    train(replace(one, output_dir=config.output_dir / "without"))
    assert "draws" not in capsys.readouterr().out

    monkeypatch.setattr(self_check, "load_adapter", lambda *positional: None)
    train(replace(one, output_dir=config.output_dir / "other", check_result=True))
    assert "warning: loaded into a fresh base model, adapter.safetensors draws another" in capsys.readouterr().out

    def no_memory(*positional: Any) -> None:
        raise torch.OutOfMemoryError("not enough")

    monkeypatch.setattr(self_check, "load_base", no_memory)
    train(replace(one, output_dir=config.output_dir / "third", check_result=True))
    assert "warning: adapter.safetensors was not tried in a fresh base model: not enough" in capsys.readouterr().out


def test_report_names_no_folder_of_a_base_or_a_vae(tmp_path: Path) -> None:
    config = TrainingConfig(
        pretrained_model_name_or_path=str(tmp_path / "base"), pretrained_vae_model_name_or_path=str(tmp_path / "vae")
    )
    settings = _settings_without_folders(config)
    names = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path")
    assert [settings[name] for name in names] == ["base", "vae"]
