"""`train-many` in several processes, and processes that end in the midst of it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from many_subjects import World

from svft_diffusion.errors import UserError
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.many import worker
from svft_diffusion.training.many.processes import Process, stand_alone
from svft_diffusion.training.many.record import Claims
from svft_diffusion.training.trainer import train

ROWS = [{"name": f"row {seed}", "seed": seed} for seed in range(4)]
posix = pytest.mark.skipif(os.name == "nt", reason="Windows ends a process at once")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_two_processes_of_accelerate_give_the_adapters_of_one(world: World) -> None:
    # Without a GPU, too: with --cpu it would start one process, or MPI.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    running = world.launch(ROWS, *launcher)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 0, said
    assert "process 1: row" in said and "process 2: row" in said
    assert said.count(": begins") == len(ROWS)
    launched = [world.adapter(row["name"]) for row in ROWS]
    world.output = world.folder / "one process"
    assert world.run(ROWS) == 0
    assert launched == [world.adapter(row["name"]) for row in ROWS]


@pytest.mark.parametrize(
    ("given", "process", "left"),
    [
        (
            {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "PMI_SIZE": "4", "HOME": "h"},
            Process(3, 4),
            {"HOME": "h", "CUDA_VISIBLE_DEVICES": "1"},
        ),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "5,7"},
            Process(0, 2),
            {"CUDA_VISIBLE_DEVICES": "5"},
        ),
        ({"CUDA_VISIBLE_DEVICES": "5,7"}, Process(0, 1), {"CUDA_VISIBLE_DEVICES": "5,7"}),
    ],
)
def test_a_process_stands_alone(
    given: dict[str, str], process: Process, left: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with mock.patch.dict(os.environ, given, clear=True):
        assert stand_alone() == process
        assert dict(os.environ) == left


def test_a_process_that_holds_a_part_of_a_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="start it without FSDP"):
        stand_alone()


def test_rows_of_another_process_are_waited_for_and_taken_over_when_it_dies(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of a killed process is gone: what it had claimed is free."""
    world.output.mkdir()
    claims = Claims(world.output)
    claim = claims.claim("row 0")
    assert claim is not None and not claims.is_free("row 0")
    order: list[str] = []

    def noting(config: TrainingConfig, **options: Any) -> Any:
        order.append(config.output_dir.name)
        result = train(config, **options)
        if len(order) == 2:
            claim.lock.release()
        return result

    monkeypatch.setattr(worker, "train", noting)
    assert world.run(ROWS[:3]) == 0
    assert order == ["row 1", "row 2", "row 0"]


def test_what_failed_in_another_process_is_not_tried_again_here(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def failing(config: TrainingConfig, **options: Any) -> Any:
        calls.append(config.output_dir.name)
        raise RuntimeError("boom")

    world.output.mkdir()
    world.arguments(ROWS[:1])
    monkeypatch.setattr(worker, "train", failing)
    job = world.job(ROWS[:1])
    first, second = worker.Worker(job), worker.Worker(job)
    assert first.work().states == second.work().states == {"failed": 1}
    assert worker.Worker(job).work().states == {"failed": 1}  # a new start tries again
    assert calls == ["row 0", "row 0"]


def _interrupting(world: World, monkeypatch: pytest.MonkeyPatch, act: Any, name: str = "row 1") -> None:
    """Let ``act`` happen after the first step of a row."""

    def interrupted(config: TrainingConfig, *, on_step: Any, **options: Any) -> Any:
        def stepped(report: Any) -> None:
            on_step(report)
            if config.output_dir.name == name and report.step == 1:
                act()

        return train(config, on_step=stepped, **options)

    monkeypatch.setattr(worker, "train", interrupted)


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_row_and_the_next_start_goes_on(
    world: World, number: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _interrupting(world, monkeypatch, lambda: os.kill(os.getpid(), number))
    assert world.run(ROWS[:3], checkpointing_steps=100) == 128 + number
    assert world.states() == {"row 0": "finished", "row 1": "interrupted", "row 2": "waiting"}
    status = json.loads((world.output / "status.json").read_text(encoding="utf-8"))
    assert status["state"] == "stopped" and status["counts"] == {"finished": 1, "interrupted": 1, "waiting": 1}
    assert (world.output / "row 1" / "checkpoint-1").is_dir()
    monkeypatch.setattr(worker, "train", train)
    capfd.readouterr()
    assert world.run(ROWS[:3], checkpointing_steps=100) == 0
    assert "going on from step 1" in capfd.readouterr().out
    assert world.adapter("row 1") == world.alone(ROWS[1])


def test_the_stop_file_of_all_rows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.output.mkdir()
    (world.output / "stop").touch()
    time.sleep(0.05)
    _interrupting(world, monkeypatch, (world.output / "stop").touch)
    assert world.run(ROWS[:3]) == 0
    assert world.states() == {"row 0": "finished", "row 1": "interrupted", "row 2": "waiting"}


def test_the_stop_file_of_one_row_leaves_the_others_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupting(world, monkeypatch, (world.output / "row 1" / "stop").touch)
    assert world.run(ROWS[:3]) == 0
    assert world.states() == {"row 0": "finished", "row 1": "stopped", "row 2": "finished"}
    monkeypatch.setattr(worker, "train", train)
    assert world.run(ROWS[:3]) == 0
    assert world.states()["row 1"] == "finished" and world.adapter("row 1") == world.alone(ROWS[1])


@posix
@pytest.mark.slow
def test_killed_in_the_midst(world: World) -> None:
    running = world.launch(ROWS[:2], max_train_steps=40)
    checkpoint = world.output / "row 0" / "checkpoint-2"
    deadline = time.monotonic() + 200
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.kill()
    running.communicate()
    assert checkpoint.exists() and not (world.output / "report.json").exists()
    assert world.run(ROWS[:2], max_train_steps=40) == 0
    assert world.adapter("row 0") == world.alone(ROWS[0], max_train_steps=40)


def test_the_base_model_can_not_be_loaded(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.folder / "tiny" / "unet" / "config.json").unlink()
    assert world.run(ROWS[:2]) == 2
    assert "the base model tiny can't be loaded" in capsys.readouterr().err
    assert world.states() == {"row 0": "interrupted", "row 1": "waiting"}


def test_dry_run(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ROWS[0], {"name": "long", "max_train_steps": 100}]
    assert world.run(rows, "--dry_run", "--json") == 0
    estimate = json.loads(capsys.readouterr().out)
    first = estimate["first"]
    assert (estimate["subjects"], estimate["steps"]) == (2, 102)
    assert estimate["total_seconds"] == pytest.approx(first["seconds_to_start"] + 102 * first["seconds_per_step"])
    assert estimate["adapter_bytes"] == 2 * first["adapter_bytes"]
    assert not world.output.exists()


def test_without_ray(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert world.run(ROWS[:1], "--engine", "ray") == 2
    assert "pip install 'svft-diffusion[ray]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "3"])
def test_ray(world: World, workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    rows = [*ROWS[:3], {"name": "bad", "learning_rate": 1e30, "max_grad_norm": 1e30, "init": "random"}]
    assert world.run(rows, "--engine", "ray", "--ray_workers", workers) == 1
    assert world.states() == {"row 0": "finished", "row 1": "finished", "row 2": "finished", "bad": "failed"}
    assert f"ray: {workers} at a time" in capsys.readouterr().out
    with_ray = [world.adapter(row["name"]) for row in ROWS[:3]]
    assert with_ray == [world.alone(row) for row in ROWS[:3]]


@pytest.mark.slow
def test_a_stop_file_reaches_the_workers_of_ray(world: World) -> None:
    pytest.importorskip("ray")

    def stop() -> None:
        while not (world.output / "row 0" / "checkpoint-1").exists():
            time.sleep(0.05)
        (world.output / "stop").touch()

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        assert world.run(ROWS[:2], "--engine", "ray", "--ray_workers", "1", max_train_steps=400) == 0
    finally:
        thread.join()
    assert world.states() == {"row 0": "interrupted", "row 1": "waiting"}
    assert (world.output / "row 0" / "adapter.safetensors").is_file()


@pytest.mark.slow
@posix
def test_a_worker_of_ray_that_dies_is_replaced_and_goes_on(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    folder = world.output / "row 0"

    def kill() -> None:
        while not (folder / "checkpoint-1").exists():
            time.sleep(0.05)
        os.kill(json.loads((folder / "status.json").read_text(encoding="utf-8"))["pid"], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        assert world.run(ROWS[:2], "--engine", "ray", "--ray_workers", "1", max_train_steps=30) == 0
    finally:
        thread.join()
    assert json.loads((folder / "subject.json").read_text(encoding="utf-8"))["attempts"] == 2
    assert world.adapter("row 0") == world.alone(ROWS[0], max_train_steps=30)
