"""Checkpoints of training runs: how many stay, that runs go on from them exactly, and which are refused."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import FREEZING, arguments, checkpoints, short_run

from svft_diffusion.cli.main import run_command
from svft_diffusion.errors import UserError
from svft_diffusion.training.checkpoints import load_checkpoint_state, remove_leftovers, save_checkpoint
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.run import Run
from svft_diffusion.training.trainer import StepReport, train


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


def test_going_back_sets_aside_what_came_later(
    config: TrainingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else ``latest`` would go on from the other course of the run, and the history would mix both."""
    samples: dict[str, Any] = {"validation_prompt": "a dog", "num_validation_images": 1, "validation_steps": 2}
    config = replace(config, **samples, thumbnail=False, check_result=False, max_train_steps=8)
    earlier = train(config).adapter.read_bytes()
    back = replace(config, resume_from_checkpoint="checkpoint-2", instance_prompt="a photo of sks cat")

    def stop_at_three(report: StepReport) -> None:
        if report.step == 3:
            raise RuntimeError("power cut")

    capsys.readouterr()
    with pytest.raises(RuntimeError, match="power cut"):
        train(replace(back, checkpoints_total_limit=1), on_step=stop_at_three)
    aside = config.output_dir / "earlier-1"
    assert f"going back to step 2: what an earlier run saved after it is in {aside} now" in capsys.readouterr().out
    assert checkpoints(config.output_dir) == {"checkpoint-2"}
    assert checkpoints(aside) == {"checkpoint-4", "checkpoint-6", "checkpoint-8"}
    steps = sorted(int(path.stem.removeprefix("step-")) for path in (config.output_dir / "history").iterdir())
    assert steps == [1, 2, 3]
    drawn = sorted(path.name for path in (config.output_dir / "samples").iterdir())
    assert drawn == ["step-000000-0.png", "step-000002-0.png"]
    assert len((aside / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 8
    assert load_checkpoint_state(aside / "checkpoint-8") and (aside / "samples" / "step-000008-0.png").is_file()
    result = train(replace(back, resume_from_checkpoint="latest"))
    assert "going on from step 2" in capsys.readouterr().out and result.adapter.read_bytes() != earlier
    assert not (config.output_dir / "earlier-2").exists()


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
    with pytest.raises(UserError, match=r"checkpoint-2 is incomplete.*resume from an earlier checkpoint"):
        train(resumed)


def damage(file: Path) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["adapter.safetensors", "training_state.safetensors", "training_state.json"])
def test_latest_is_the_newest_that_is_whole(
    finished: TrainingConfig, config: TrainingConfig, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (finished.output_dir / "adapter.safetensors").read_bytes()
    shutil.copytree(finished.output_dir, config.output_dir)
    damage(config.output_dir / "checkpoint-4" / name)
    result = train(replace(config, resume_from_checkpoint="latest"))
    said = capsys.readouterr().out
    assert f"{name} is damaged: going on from checkpoint-2 instead" in said and "going on from step 2" in said
    assert result.adapter.read_bytes() == whole
    assert load_checkpoint_state(config.output_dir / "checkpoint-4")  # written anew


def test_no_whole_checkpoint_is_an_error(finished: TrainingConfig, config: TrainingConfig) -> None:
    shutil.copytree(finished.output_dir, config.output_dir)
    damage(config.output_dir / "checkpoint-4" / "adapter.safetensors")
    (config.output_dir / "checkpoint-2" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole: .*damaged; .*checkpoint-2 is incomplete"):
        train(replace(config, resume_from_checkpoint="latest"))


def test_files_of_others_and_wrong_names_are_refused(finished: TrainingConfig, config: TrainingConfig) -> None:
    shutil.copytree(finished.output_dir, config.output_dir)
    checkpoint = config.output_dir / "checkpoint-4"
    (checkpoint / ".DS_Store").write_bytes(b"")
    (checkpoint / "desktop.ini").write_bytes(b"")
    assert load_checkpoint_state(checkpoint)
    (checkpoint / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"optimizer\.pt does not belong to the checkpoint"):
        load_checkpoint_state(checkpoint)
    (checkpoint / "optimizer.pt").unlink()
    checkpoint.rename(config.output_dir / "checkpoint-6")
    with pytest.raises(UserError, match="checkpoint-6 holds the state of step 4"):
        train(replace(config, max_train_steps=8, resume_from_checkpoint="checkpoint-6"))


def test_other_settings_than_the_checkpoint_s_are_refused(finished: TrainingConfig, config: TrainingConfig) -> None:
    shutil.copytree(finished.output_dir, config.output_dir)
    for changes, message in [({"use_ema": True}, "use_ema=False, now it is True"), (FREEZING, "method=svft")]:
        with pytest.raises(UserError, match=message):
            train(replace(config, **changes, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 8},
        {"aspect_ratio_buckets": "16,16;16,24"},
        {"center_crop": True},
        {"random_flip": True},
        {"image_interpolation_mode": "nearest"},
        {"caption_dropout": 0.5},
        {"target_layers": "to_k"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_pixels_than_the_checkpoint_s_are_refused(
    finished: TrainingConfig, config: TrainingConfig, change: dict[str, Any]
) -> None:
    """Another size, shape or place of the pictures would be another run."""
    shutil.copytree(finished.output_dir, config.output_dir)
    with pytest.raises(UserError, match=rf"was trained with {next(iter(change))}=.*resume with the same") as refusal:
        train(replace(config, **change, max_train_steps=5, resume_from_checkpoint="latest"))
    assert "\n" not in str(refusal.value)


def forget_settings(output_dir: Path, names: list[str]) -> None:
    """Make ``checkpoint-2`` one of a version that did not write these settings down."""
    checkpoint = output_dir / "checkpoint-2"
    state, adapter = load_checkpoint_state(checkpoint), (checkpoint / "adapter.safetensors").read_bytes()
    for name in names:
        del state["settings"][name]
    save_checkpoint(output_dir, 2, lambda path: path.write_bytes(adapter), state, None)


def test_settings_that_a_checkpoint_does_not_know_are_the_defaults(
    finished: TrainingConfig, config: TrainingConfig
) -> None:
    shutil.copytree(finished.output_dir, config.output_dir)
    # One with a default of its own, one that follows from the base, one from other settings, and one that is derived.
    unknown = ["caption_dropout", "resolution", "adam_beta2", "learning_rate_1d", "cut_mix_unmix", "token_steps"]
    unknown += ["pictures_per_step_of_scale_lr", "lr_warmup_steps_of_schedulefree"]
    forget_settings(config.output_dir, unknown)
    for change, default in (
        ({"caption_dropout": 0.5}, "0.0"),
        ({"resolution": 8}, "16"),
        ({"adam_beta2": 0.9}, "0.999"),
    ):
        (name,) = change
        with pytest.raises(UserError, match=rf"checkpoint-2 .* without {name}, .* {default}") as refusal:
            train(replace(config, **change, resume_from_checkpoint="checkpoint-2"))  # type: ignore[arg-type]
        assert "\n" not in str(refusal.value)
    again = train(replace(config, resume_from_checkpoint="checkpoint-2"))
    assert again.adapter.read_bytes() == (finished.output_dir / "adapter.safetensors").read_bytes()


def test_runs_have_checkpoints_unless_somebody_says_otherwise(config: TrainingConfig) -> None:
    silent = replace(config, checkpointing_steps=None)
    asked = {steps: silent.steps_between_checkpoints(steps) for steps in (3, 10, 400, 4999, 5000, 80_000)}
    assert asked == {3: 1, 10: 1, 400: 40, 4999: 499, 5000: 500, 80_000: 500}
    assert config.steps_between_checkpoints(400) == 2
    train(replace(silent, max_train_steps=20, checkpoints_total_limit=3))
    assert checkpoints(config.output_dir) == {"checkpoint-16", "checkpoint-18", "checkpoint-20"}


@pytest.mark.parametrize(("removed", "message"), [("optimizer", "has no state of optimizer"), (None, "has a state of")])
def test_missing_and_foreign_pieces_are_refused(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, removed: str | None, message: str
) -> None:
    pieces = Run.pieces.fget  # type: ignore[attr-defined]

    class Counter:
        def state_dict(self) -> dict[str, Any]:
            return {"count": 3, "values": torch.ones(2)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError("nothing is loaded when the pieces differ")

    def other_pieces(run: Run) -> dict[str, Any]:
        if removed is None:
            return pieces(run) | {"counter": Counter()}
        return {name: piece for name, piece in pieces(run).items() if name != removed}

    with monkeypatch.context() as patch:
        patch.setattr(Run, "pieces", property(other_pieces))
        train(config)
    with pytest.raises(UserError, match=message):
        train(replace(config, max_train_steps=6, resume_from_checkpoint="latest"))


def test_other_pictures_than_the_checkpoint_s_are_told(
    finished: TrainingConfig, config: TrainingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finished.instance_data_dir is not None
    photos = shutil.copytree(finished.instance_data_dir, tmp_path / "fewer")
    shutil.copytree(finished.output_dir, config.output_dir)
    (photos / "3.png").unlink()
    resumed = replace(config, max_train_steps=5, resume_from_checkpoint="latest")
    train(resumed)
    assert "the pictures are not those" not in capsys.readouterr().out
    train(replace(resumed, instance_data_dir=photos, max_train_steps=6))
    assert "the pictures are not those of checkpoint-4" in capsys.readouterr().out


def state(step: int) -> dict[str, Any]:
    return {"step": step, "betas": (0.9, 0.99), "moments": {0: torch.full((3,), float(step))}, "empty": None}


@pytest.fixture
def write_adapter(finished: TrainingConfig) -> Callable[[Path], object]:
    return lambda path: shutil.copyfile(finished.output_dir / "adapter.safetensors", path)


def test_state_comes_back_as_it_was(tmp_path: Path, write_adapter: Callable[[Path], object]) -> None:
    loaded = load_checkpoint_state(save_checkpoint(tmp_path, 3, write_adapter, state(3), None))
    assert loaded["step"] == 3 and loaded["betas"] == [0.9, 0.99] and loaded["empty"] is None
    assert torch.equal(loaded["moments"][0], torch.full((3,), 3.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3"]


def test_state_that_is_not_finite_is_not_saved(tmp_path: Path, write_adapter: Callable[[Path], object]) -> None:
    save_checkpoint(tmp_path, 3, write_adapter, state(3), 1)
    with pytest.raises(UserError, match=r"step 4 is not saved: state\.moments\.0 is not finite"):
        save_checkpoint(tmp_path, 4, write_adapter, state(4) | {"moments": {0: torch.tensor([1.0, math.inf])}}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_older_checkpoints_go_only_when_the_new_one_was_read_again(
    tmp_path: Path, write_adapter: Callable[[Path], object]
) -> None:
    save_checkpoint(tmp_path, 3, write_adapter, state(3), 1)
    with pytest.raises(UserError, match="is no safetensors file"):
        save_checkpoint(tmp_path, 4, lambda path: path.write_bytes(b"no adapter"), state(4), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert load_checkpoint_state(tmp_path / "checkpoint-3")["step"] == 3


def test_leftovers_of_killed_writers(tmp_path: Path, write_adapter: Callable[[Path], object]) -> None:
    save_checkpoint(tmp_path, 3, write_adapter, state(3), None)
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / ".checkpoint-3.old")  # replaced, and not yet removed
    (tmp_path / ".checkpoint-4.tmp").mkdir()
    save_checkpoint(tmp_path, 5, write_adapter, state(5), None)
    (tmp_path / "checkpoint-5").rename(tmp_path / ".checkpoint-5.old")  # to be replaced, and never was
    (tmp_path / ".checkpoint-note").mkdir()  # not ours
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-5", ".checkpoint-note"}
    assert load_checkpoint_state(tmp_path / "checkpoint-5")["step"] == 5
