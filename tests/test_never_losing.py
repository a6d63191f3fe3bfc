"""Runs that are stopped, watched, or go wrong: nothing is lost, and everybody is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from training_runs import PROMPT, arguments, checkpoints, short_run, trained_tensors

from svft_diffusion.cli.main import main, run_command
from svft_diffusion.errors import Interrupted, UserError
from svft_diffusion.files import read_header
from svft_diffusion.training import loss_plot, status, step
from svft_diffusion.training.batches import _leave_signals_to_the_run
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.history import history_file
from svft_diffusion.training.interruption import SIGNALS as SIGNALS_OF_RUNS
from svft_diffusion.training.interruption import Interruption
from svft_diffusion.training.trainer import StepReport, train

SIGNALS = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
SAMPLES: dict[str, Any] = {"validation_prompt": PROMPT, "num_validation_images": 1, "validation_steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """A run with samples that is over; its folder is only read."""
    config = replace(short_run(tmp_path_factory.mktemp("finished")), **SAMPLES)
    train(config)
    return config


@pytest.fixture
def config(finished: TrainingConfig, tmp_path: Path) -> TrainingConfig:
    """The same run in a folder of its own, not begun yet; without samples."""
    return replace(finished, output_dir=tmp_path / "out", validation_prompt=None)


@pytest.fixture(scope="module")
def whole(finished: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of an uninterrupted run without samples."""
    output_dir = tmp_path_factory.mktemp("whole") / "out"
    return train(replace(finished, output_dir=output_dir, validation_prompt=None)).adapter.read_bytes()


def status_of(config: TrainingConfig) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((config.output_dir / "status.json").read_text(encoding="utf-8"))
    return told


def at_step(number: int, act: Callable[[], object]) -> Callable[[StepReport], None]:
    def watch(report: StepReport) -> None:
        if report.step == number:
            act()

    return watch


# Stopping


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_save_and_exit_with_their_code(config: TrainingConfig, whole: bytes, name: str) -> None:
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted) as request:
        train(config, on_step=at_step(3, lambda: signal.raise_signal(number)))
    assert request.value.exit_code == 128 + number and signal.getsignal(number) is handler
    assert checkpoints(config.output_dir) == {"checkpoint-2", "checkpoint-3"}
    assert (config.output_dir / "adapter.safetensors").is_file() and status_of(config)["state"] == "stopped"
    assert train(replace(config, resume_from_checkpoint="latest")).adapter.read_bytes() == whole


def test_command_exits_with_the_signal_s_code(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = step.denoising_losses

    def terminated(*positional: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)  # in the midst of a step
        return real(*positional, **named)

    monkeypatch.setattr(step, "denoising_losses", terminated)
    assert run_command("train", arguments(config, gradient_accumulation_steps=2)) == 143
    said = capsys.readouterr()
    assert "stopped after step 1, all saved" in said.out and said.err.endswith("interrupted\n")
    assert checkpoints(config.output_dir) == {"checkpoint-1"}


@pytest.mark.parametrize("asked", [True, False])
def test_readers_of_the_output_may_go(
    config: TrainingConfig, whole: bytes, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """Ctrl-C in ``train 2>&1 | tee log`` ends ``tee`` at once, and the run a step later."""
    reading, writing = os.pipe()
    real = step.denoising_losses
    calls: list[int] = []

    def reader_goes(*positional: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.close(reading)
            if asked:
                signal.raise_signal(signal.SIGINT)
        return real(*positional, **named)

    with open(writing, "w", buffering=1) as pipe, monkeypatch.context() as patch:
        patch.setattr(step, "denoising_losses", reader_goes)
        patch.setattr("sys.stdout", pipe)
        patch.setattr("sys.stderr", pipe)
        assert run_command("train", arguments(config)) == (130 if asked else 141)
    if asked:
        assert checkpoints(config.output_dir) == {"checkpoint-2", "checkpoint-3"}
        config = replace(config, resume_from_checkpoint="latest")
        train(config)
    assert (config.output_dir / "adapter.safetensors").read_bytes() == whole


def test_second_control_c_ends_at_once(config: TrainingConfig) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stop:
        train(config, on_step=at_step(3, twice))
    assert not isinstance(stop.value, Interrupted)
    assert checkpoints(config.output_dir) == {"checkpoint-2"}
    assert not (config.output_dir / "adapter.safetensors").exists()


def test_control_c_that_torchrun_passes_on_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Interruption(tmp_path) as interruption:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted):
            interruption.check()


def test_handlers_of_others_are_put_back_and_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption(tmp_path) as interruption:
            signal.raise_signal(signal.SIGINT)
            interruption.check()
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(Interrupted):
                interruption.check()
        assert heard == []
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, ignored)


def test_stop_file_ends_the_run_in_any_thread(config: TrainingConfig, whole: bytes) -> None:
    stop = config.output_dir / "stop"
    codes: list[int] = []

    def run() -> None:
        try:
            train(config, on_step=at_step(3, stop.touch))
        except Interrupted as request:
            codes.append(request.exit_code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [0] and not stop.exists() and status_of(config)["state"] == "stopped"
    assert checkpoints(config.output_dir) == {"checkpoint-2", "checkpoint-3"}
    assert train(replace(config, resume_from_checkpoint="latest")).adapter.read_bytes() == whole


def test_stop_file_of_an_earlier_time_is_no_request(config: TrainingConfig) -> None:
    config.output_dir.mkdir()
    (config.output_dir / "stop").touch()
    assert train(replace(config, max_train_steps=1)).steps == 1
    assert not (config.output_dir / "stop").exists()


def test_folder_named_stop_is_no_request(config: TrainingConfig) -> None:
    (config.output_dir / "stop").mkdir(parents=True)
    assert train(replace(config, max_train_steps=1)).steps == 1
    assert (config.output_dir / "stop").is_dir()


def test_loading_processes_survive_every_signal_that_the_run_does() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS_OF_RUNS}
    try:
        _leave_signals_to_the_run(0)
        assert {signal.getsignal(number) for number in SIGNALS_OF_RUNS} == {signal.SIG_IGN}
        assert signal.SIGINT in SIGNALS_OF_RUNS and {getattr(signal, name) for name in SIGNALS} <= {*SIGNALS_OF_RUNS}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_curves_that_can_not_be_drawn_are_one_line(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    config = replace(config, report_to="tensorboard", max_train_steps=1)
    with pytest.raises(UserError, match=r"can't write to .* is a file"):
        train(replace(config, logging_dir=Path(__file__)))

    def no_login(accelerator: Accelerator, *positional: Any) -> None:
        accelerator.trackers = [object()]  # begun, and of no use
        raise RuntimeError("no key\nlog in first")

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "init_trackers", no_login)
        with pytest.raises(UserError, match=r"does not work here \(no key log in first\); try --report_to none"):
            train(config)
    assert run_command("train", arguments(config, report_to="tensorboard")) == 0  # nothing is in the way


def test_stop_before_the_first_step(config: TrainingConfig, whole: bytes) -> None:
    for state in (status.ENCODING_PICTURES, status.SAMPLING):

        def enter(told: status.RunStatus, now: str, state: str = state) -> None:
            if now == state:
                signal.raise_signal(signal.SIGTERM)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(status.RunStatus, "enter", enter)
            with pytest.raises(Interrupted):
                train(replace(config, **SAMPLES))
        assert checkpoints(config.output_dir) == set()
    # There is nothing to go on from, and nothing in the way.
    assert run_command("train", arguments(config)) == 0
    assert (config.output_dir / "adapter.safetensors").read_bytes() == whole


def test_stop_while_class_images_are_drawn(config: TrainingConfig, tmp_path: Path) -> None:
    prior: dict[str, Any] = {
        "with_prior_preservation": True,
        "class_prompt": "a photo of a dog",
        "num_class_images": 3,
        "sample_batch_size": 1,
        "prior_generation_num_inference_steps": 2,
    }
    whole = replace(config, output_dir=tmp_path / "whole", class_data_dir=tmp_path / "class", **prior)
    expected = train(whole).adapter.read_bytes()
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "class").glob("*.png")}
    parts = replace(config, class_data_dir=tmp_path / "class2", **prior)
    calls: list[str] = []
    real = status.RunStatus.enter

    def enter(told: status.RunStatus, state: str) -> None:
        real(told, state)
        calls.append(state)
        if calls.count(status.DRAWING_CLASS_IMAGES) == 3:  # in the midst of the second picture
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(status.RunStatus, "enter", enter)
        with pytest.raises(Interrupted) as request:
            train(parts)
    assert request.value.exit_code == 143 and set(calls) == {status.DRAWING_CLASS_IMAGES}
    assert [path.name for path in (tmp_path / "class2").glob("*.png")] == ["class-00000.png"]
    assert train(parts).adapter.read_bytes() == expected
    assert {path.name: path.read_bytes() for path in (tmp_path / "class2").glob("*.png")} == pictures


@pytest.mark.parametrize("drawn_before", [1, 2])  # the samples of step 2, and those of the end
def test_stop_in_a_preview(finished: TrainingConfig, tmp_path: Path, drawn_before: int) -> None:
    config = replace(finished, output_dir=tmp_path / "out")
    samples = config.output_dir / "samples"

    def stop_in_sampling(told: status.RunStatus, state: str) -> None:
        if state == status.SAMPLING and len(list(samples.glob("*.png"))) == drawn_before:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(status.RunStatus, "enter", stop_in_sampling)
        with pytest.raises(Interrupted):
            train(config)
    assert f"checkpoint-{2 * drawn_before}" in checkpoints(config.output_dir)
    result = train(replace(config, resume_from_checkpoint="latest"))
    for file in ("adapter.safetensors", "metrics.jsonl", "samples/step-000002-0.png", "samples/step-000004-0.png"):
        assert (result.output_dir / file).read_bytes() == (finished.output_dir / file).read_bytes(), file


# Watching


def test_status_says_what_goes_on(finished: TrainingConfig, tmp_path: Path) -> None:
    config = replace(finished, output_dir=tmp_path / "out")
    seen: list[dict[str, Any]] = []
    real = status.RunStatus._write

    def write(told: status.RunStatus) -> None:
        real(told)
        seen.append(status_of(config))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(status.RunStatus, "_write", write)
        patch.setattr(status, "_SECONDS_BETWEEN_WRITES", 0.0)
        train(config)
    states = [told["state"] for told in seen]
    assert list(dict.fromkeys(states)) == ["starting", "encoding pictures", "sampling", "training", "finished"]
    assert seen[0]["step"] is None and seen[0]["pid"] == os.getpid()
    training = [told for told in seen if told["state"] == "training"]
    assert [told["step"] for told in training] == [1, 2, 3, 4] and {told["total_steps"] for told in training} == {4}
    assert all(told["loss"] > 0 and told["seconds_per_step"] > 0 for told in training)
    second = training[1]
    assert second["eta_seconds"] == pytest.approx(2 * second["seconds_per_step"], abs=0.06)
    assert seen[-1]["reason"] is None and seen[-1]["step"] == 4 and seen[-1]["updated"] >= seen[0]["updated"]


def test_status_of_a_failure_names_no_folder(config: TrainingConfig, tmp_path: Path) -> None:
    assert config.instance_data_dir is not None
    photos = shutil.copytree(config.instance_data_dir, tmp_path / "photos here")
    vanishing = replace(config, instance_data_dir=photos, cache_latents=False)
    with pytest.raises(UserError, match="can't be used any more"):
        train(vanishing, on_step=at_step(1, lambda: [file.unlink() for file in photos.glob("*.png")]))
    told = status_of(config)
    assert told["state"] == "failed" and ".png can't be used any more" in told["reason"]
    text = (config.output_dir / "status.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and str(tmp_path.parent.name) not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("can't write /home/me/run/out/x.png: No space", "can't write x.png: No space"),
        ("can't write C:\\Users\\me\\x.png: full", "can't write x.png: full"),
        ("can't read C:\\Users\\Jo Doe\\my photos\\a b.png: full", "can't read a b.png: full"),
        ("\\\\server\\the share\\x.png and /a b/y.png are none", "x.png and y.png are none"),
        ("/a/b.png is no picture of 3/4", "b.png is no picture of 3/4"),
        ("see someone/model and 3/4", "see someone/model and 3/4"),
        ("/a/b is 'damaged' (/c/d/e)", "b is 'damaged' (e)"),
    ],
)
def test_reasons_without_folders(text: str, shown: str) -> None:
    assert status.reason_in_one_line(UserError(text)) == shown
    assert status.reason_in_one_line(OSError(text)) == f"OSError: {shown}"


def test_full_disk_for_the_status_alone_ends_nothing(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_text

    def full(path: Path, *positional: Any, **named: Any) -> int:
        if "status.json" in path.name:
            raise OSError(28, "No space left on device")
        return real(path, *positional, **named)

    monkeypatch.setattr(Path, "write_text", full)
    assert train(replace(config, max_train_steps=1)).steps == 1
    assert not (config.output_dir / "status.json").exists()


def test_metrics_tell_smoothed_loss_and_norm(finished: TrainingConfig) -> None:
    rows = [json.loads(line) for line in (finished.output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    weights = [0.98 ** (3 - index) for index in range(4)]
    expected = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert rows[-1]["smoothed_loss"] == pytest.approx(expected) and rows[0]["smoothed_loss"] == pytest.approx(losses[0])
    norms = [row["value_norm"] for row in rows]
    assert norms == sorted(norms) and norms[0] > 0
    tensors = trained_tensors(finished.output_dir / "adapter.safetensors").values()
    values = torch.cat([tensor.flatten() for tensor in tensors])
    assert norms[-1] == pytest.approx(float(values.norm()), rel=1e-5)


def test_loss_is_drawn_where_matplotlib_is(
    finished: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    with Image.open(finished.output_dir / "loss.png") as image:
        assert image.width > 500 and len(image.convert("RGB").getcolors(1 << 20) or []) > 20
    shutil.copy(finished.output_dir / "metrics.jsonl", tmp_path)
    monkeypatch.setattr(loss_plot.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'svft-diffusion[plots]'" in loss_plot.draw_loss(tmp_path)
    assert not (tmp_path / "loss.png").exists()


# History


def test_history_keeps_the_adapter_of_every_step(finished: TrainingConfig) -> None:
    folder = finished.output_dir / "history"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{number}.safetensors" for number in (1, 2, 3, 4)]
    header = read_header(folder / "step-3.safetensors")
    assert header.training["finished_steps"] == 3 and header.instance_prompt == PROMPT
    assert "finished_steps" not in read_header(finished.output_dir / "adapter.safetensors").training


@pytest.mark.parametrize(("steps", "kept"), [(0, set()), (2, {2, 4, 5}), (None, {1, 2, 3, 4, 5})])
def test_history_steps(config: TrainingConfig, steps: int | None, kept: set[int]) -> None:
    train(replace(config, max_train_steps=5, history_steps=steps))
    assert {int(path.stem.removeprefix("step-")) for path in config.output_dir.glob("history/*")} == kept


def test_resumed_history_has_equal_bytes(finished: TrainingConfig, tmp_path: Path) -> None:
    config = replace(finished, output_dir=tmp_path / "out")

    def power_cut() -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(config, on_step=at_step(3, power_cut))
    third = history_file(config.output_dir, 3).read_bytes()  # of a step after the last checkpoint
    train(replace(config, resume_from_checkpoint="latest"))
    assert history_file(config.output_dir, 3).read_bytes() == third
    for number in (1, 2, 3, 4):
        expected = history_file(finished.output_dir, number).read_bytes()
        assert history_file(config.output_dir, number).read_bytes() == expected, number


def test_history_of_a_run_without_checkpoint_is_set_aside(
    config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    def power_cut() -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(replace(config, checkpointing_steps=9), on_step=at_step(2, power_cut))
    second = history_file(config.output_dir, 2).read_bytes()
    (config.output_dir / f".adapter.safetensors.{'0' * 32}.tmp").write_bytes(b"half")
    assert run_command("train", arguments(config, max_train_steps=1)) == 0
    assert "the adapters that it kept are in" in capsys.readouterr().out
    assert {path.name for path in config.output_dir.glob("history/*")} == {"step-1.safetensors"}
    assert history_file(config.output_dir / "earlier-1", 2).read_bytes() == second
    assert not list(config.output_dir.glob(".*"))
    assert main(["history", str(config.output_dir / "earlier-1")]) == 0


def test_history_command_lists_and_draws(
    finished: TrainingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished.output_dir, tmp_path / "out")
    assert main(["history", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["1", "2", "3", "4"]
    assert [line.split()[-1] for line in lines[1:5]] == ["-", "1", "-", "1"]
    with Image.open(folder / "history" / "samples.png") as strip:
        assert strip.width > 3 * 160  # the base model and two steps
    assert main(["history", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["step"] for entry in told["steps"]] == [1, 2, 3, 4] and told["strip"].endswith("samples.png")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["smoothed_loss"] for entry in told["steps"]] == [row["smoothed_loss"] for row in metrics]


def test_history_picks_one(finished: TrainingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(finished.output_dir, tmp_path / "out")
    second = history_file(folder, 2).read_bytes()
    assert main(["history", str(folder), "--pick", "2"]) == 0
    assert (folder / "adapter-step-2.safetensors").read_bytes() == second
    target = tmp_path / "mine.safetensors"
    assert main(["history", str(folder), "--pick", "2", "-o", str(target)]) == 0 and target.read_bytes() == second
    capsys.readouterr()
    for wrong, message in [
        (["--pick", "2", "-o", str(target)], "is there already"),
        (["--pick", "7"], "no step 7; there are 1, 2, 3, 4"),
        (["--pick", "3", "-o", str(history_file(folder, 2)), "--overwrite"], "is one of the files to read"),
        (["-o", str(target)], "--pick"),
    ]:
        assert main(["history", str(folder), *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["history", str(folder), "--pick", "3", "-o", str(target), "--overwrite"]) == 0
    assert target.read_bytes() == history_file(folder, 3).read_bytes()
    for nothing, message in [
        (tmp_path, "holds no history: give the output folder"),
        (tmp_path / "nope", "no such folder"),
        (target, "no folder"),
    ]:
        assert main(["history", str(nothing)]) == 2
        assert message in capsys.readouterr().err
