"""Checkpoints of training runs: how many stay, that runs go on from them exactly, and which are refused."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_runs import FREEZING, arguments, checkpoints, short_run

from svft_diffusion.cli.main import run_command
from svft_diffusion.errors import UserError
from svft_diffusion.training import trainer
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.trainer import StepReport, TrainingDiverged, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """A run that is over; its folder is only read."""
    config = short_run(tmp_path_factory.mktemp("finished"))
    train(config)
    return config


@pytest.fixture
def config(finished: TrainingConfig, tmp_path: Path) -> TrainingConfig:
    """The same run in a folder of its own, not begun yet."""
    return replace(finished, output_dir=tmp_path / "out")


def test_limit_keeps_the_newest(config: TrainingConfig) -> None:
    train(replace(config, max_train_steps=7, checkpoints_total_limit=2))
    assert checkpoints(config.output_dir) == {"checkpoint-4", "checkpoint-6"}


def test_limit_removes_several_after_resuming(finished: TrainingConfig, config: TrainingConfig) -> None:
    shutil.copytree(finished.output_dir, config.output_dir)
    assert checkpoints(config.output_dir) == {"checkpoint-2", "checkpoint-4"}
    train(replace(config, max_train_steps=8, resume_from_checkpoint="checkpoint-4", checkpoints_total_limit=2))
    assert checkpoints(config.output_dir) == {"checkpoint-6", "checkpoint-8"}


def test_limit_counts_no_later_checkpoints_of_an_earlier_run(config: TrainingConfig) -> None:
    train(replace(config, max_train_steps=8))
    changed = replace(config, resume_from_checkpoint="checkpoint-2", checkpoints_total_limit=1, max_train_steps=4)
    train(changed)
    # What was written just now stays; what another run wrote beyond it is not ours to remove.
    assert checkpoints(config.output_dir) == {"checkpoint-4", "checkpoint-6", "checkpoint-8"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_text_encoder": True, "gradient_accumulation_steps": 2, "method": "svdiff"},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "cache_latents": False, "timestep_sampling": "focused"},
        {"method": "svft", "pattern": "random", "off_diagonals": 1, "init": "official"},
        # The power cut at step 5, after the checkpoint of step 4, comes in the midst of a window.
        FREEZING | {"checkpointing_steps": 4, "freezing_interval": 3},
        FREEZING | {"freezing_smoothing": 0.5, "train_text_encoder": True},
    ],
)
def test_resumed_run_equals_uninterrupted(config: TrainingConfig, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = replace(config, max_train_steps=6, **changes)
    whole = train(config).adapter.read_bytes()
    parts = replace(config, output_dir=tmp_path / "parts")

    def stop_at_five(report: StepReport) -> None:
        if report.step == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(parts, on_step=stop_at_five)
    assert not (parts.output_dir / "adapter.safetensors").exists()
    result = train(replace(parts, resume_from_checkpoint="latest"))
    assert result.adapter.read_bytes() == whole
    lines = [(folder / "metrics.jsonl").read_bytes() for folder in (config.output_dir, parts.output_dir)]
    assert lines[0] == lines[1]
    logs = [folder / "freezing.jsonl" for folder in (config.output_dir, parts.output_dir)]
    assert logs[0].exists() == logs[1].exists() == ("freezing_number" in changes)
    assert not logs[0].exists() or logs[0].read_bytes() == logs[1].read_bytes()


def test_interrupted_run_is_saved_and_resumes_exactly(
    finished: TrainingConfig, config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (finished.output_dir / "adapter.safetensors").read_bytes()

    def press_control_c(report: StepReport) -> None:
        if report.step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=press_control_c)
    assert "--resume_from_checkpoint latest" in capsys.readouterr().out
    assert checkpoints(config.output_dir) == {"checkpoint-2", "checkpoint-3"}
    assert (config.output_dir / "adapter.safetensors").is_file()
    assert train(replace(config, resume_from_checkpoint="latest")).adapter.read_bytes() == whole


def test_run_that_died_before_its_first_checkpoint_starts_again(config: TrainingConfig) -> None:
    def power_cut(report: StepReport) -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(config, on_step=power_cut)
    assert run_command("train", arguments(config, max_train_steps=1)) == 0


def test_damaged_or_foreign_checkpoints_are_refused(finished: TrainingConfig, config: TrainingConfig) -> None:
    shutil.copytree(finished.output_dir, config.output_dir)
    resumed = replace(config, resume_from_checkpoint="checkpoint-2")
    with pytest.raises(UserError, match="trained with method=svft, now it is svdiff"):
        train(replace(resumed, method="svdiff"))
    # The optimizer's state holds the old rate, which would go on silently.
    with pytest.raises(UserError, match=r"trained with learning_rate=0\.05, now it is 0\.01"):
        train(replace(resumed, learning_rate=0.01))
    with pytest.raises(UserError, match="past --max_train_steps 1"):
        train(replace(resumed, max_train_steps=1))
    state = config.output_dir / "checkpoint-2" / "training_state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(UserError, match=r"training_state\.safetensors is damaged"):
        train(resumed)
    state.unlink()
    with pytest.raises(UserError, match="checkpoint-2 is incomplete"):
        train(resumed)


def test_divergence_stops_and_keeps_what_is_saved(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer.denoising_losses
    calls: list[int] = []

    def broken(*positional: Any, **named: Any) -> Any:
        calls.append(1)
        losses = real(*positional, **named)
        return replace(losses, total=losses.total * float("nan")) if len(calls) == 4 else losses

    monkeypatch.setattr(trainer, "denoising_losses", broken)
    with pytest.raises(TrainingDiverged, match="step 4"):
        train(config)
    assert checkpoints(config.output_dir) == {"checkpoint-2"}
    assert not (config.output_dir / "adapter.safetensors").exists()
