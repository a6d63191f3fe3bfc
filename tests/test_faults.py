"""Runs that are killed, stopped or whose disk fails at any moment: a checkpoint is left, and the result is the same.

`make test-faults` runs everything; the fast tests a short seeded selection of each kind.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from faults import (
    Disk,
    ForkedRuns,
    assert_nothing_is_lost,
    broken_disk,
    disk_full,
    exit_code,
    killed,
    litter,
    newest_whole_step,
    wait_for,
)
from training_runs import PROMPT, arguments, short_run

from svft_diffusion.errors import Interrupted, UserError
from svft_diffusion.models import load_pipeline
from svft_diffusion.training import status, step
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.metrics import read_metrics
from svft_diffusion.training.trainer import train

REPOSITORY = Path(__file__).parent.parent
forking = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process for every trial")
MANY = pytest.mark.slow
KILLS = [pytest.param(6, id="few"), pytest.param(200, id="many", marks=MANY)]
STOPS = [pytest.param(3, id="few"), pytest.param(50, id="many", marks=MANY)]
MICRO_STEPS = [pytest.param(3, id="few"), pytest.param(20, id="many", marks=MANY)]
DISK_FAULTS = [pytest.param(6, id="few"), pytest.param(None, id="all", marks=MANY)]


@dataclass(frozen=True)
class Uninterrupted:
    """A run that nothing happened to, and how long it took."""

    config: TrainingConfig
    adapter: bytes
    metrics: bytes
    seconds: float
    disk_operations: int
    runs: ForkedRuns


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """Six steps, each with its checkpoint, of which one stays."""
    config = replace(
        short_run(tmp_path_factory.mktemp("uninterrupted")),
        max_train_steps=6,
        checkpointing_steps=1,
        checkpoints_total_limit=1,
        gradient_accumulation_steps=2,
    )
    train(replace(config, output_dir=config.output_dir / "first"))  # what is cached for good is cached then
    runs = ForkedRuns(load_pipeline(config.pretrained_model_name_or_path))
    disk = Disk(None, killed)
    started = time.monotonic()
    with disk.watched():
        result = train(config)
    seconds = time.monotonic() - started
    metrics = (config.output_dir / "metrics.jsonl").read_bytes()
    return Uninterrupted(config, result.adapter.read_bytes(), metrics, seconds, disk.operations, runs)


@pytest.fixture
def output_dirs(tmp_path: Path) -> Iterator[Iterator[Path]]:
    """New folders, each of which is removed when the next one is asked for."""

    def folders() -> Iterator[Path]:
        number = 0
        while True:
            folder = tmp_path / str(number)
            yield folder
            shutil.rmtree(folder, ignore_errors=True)
            number += 1

    yield folders()


def finish(config: TrainingConfig, runs: ForkedRuns | None = None) -> None:
    """Go on from the newest checkpoint, or begin again where there is none, as somebody would."""
    again = replace(config, resume_from_checkpoint="latest" if newest_whole_step(config) else None)
    if runs is None:
        train(again)
    else:
        assert runs.run(again) == 0


def assert_same_result(config: TrainingConfig, expected: Uninterrupted) -> None:
    assert (config.output_dir / "adapter.safetensors").read_bytes() == expected.adapter
    assert (config.output_dir / "metrics.jsonl").read_bytes() == expected.metrics
    assert litter(config.output_dir) == []


@forking
@pytest.mark.parametrize("trials", KILLS)
def test_killed_at_any_moment(uninterrupted: Uninterrupted, output_dirs: Iterator[Path], trials: int) -> None:
    runs, draw = uninterrupted.runs, random.Random(trials)
    deaths = 0
    for trial in range(trials):
        config = replace(uninterrupted.config, output_dir=next(output_dirs))
        if trial % 2:  # in the midst of a write
            code = runs.run(config, Disk(draw.randrange(uninterrupted.disk_operations), killed))
        else:
            process = runs.start(config)
            time.sleep(draw.uniform(0.0, uninterrupted.seconds * 0.7))
            os.kill(process, signal.SIGKILL)
            code = exit_code(process)
        deaths += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), Path(f"{config.output_dir}.error").read_text(encoding="utf-8")
        assert_nothing_is_lost(config)
        if code != 0:  # also where the adapter was written already, and something after it was not
            finish(config, runs)
        assert_same_result(config, uninterrupted)
    assert deaths > trials * 0.5


@forking
@pytest.mark.parametrize("trials", KILLS)
def test_killed_again_and_again(uninterrupted: Uninterrupted, output_dirs: Iterator[Path], trials: int) -> None:
    """One run that is killed at each of its starts comes to its end all the same."""
    runs, draw = uninterrupted.runs, random.Random(trials + 1)
    config = replace(uninterrupted.config, output_dir=next(output_dirs))
    for _ in range(trials // 6):
        before = newest_whole_step(config)
        again = replace(config, resume_from_checkpoint="latest" if before else None)
        runs.run(again, Disk(draw.randrange(40), killed))
        assert newest_whole_step(config) >= before
        assert_nothing_is_lost(config)
    finish(config, runs)
    assert_same_result(config, uninterrupted)


@pytest.mark.parametrize("trials", DISK_FAULTS)
def test_disk_that_is_full_or_fails(
    uninterrupted: Uninterrupted, output_dirs: Iterator[Path], trials: int | None
) -> None:
    """At every operation: full from then on, and failing once."""
    operations: Any = range(uninterrupted.disk_operations)
    if trials is not None:
        operations = random.Random(trials).sample(operations, trials)
    for number in operations:
        for fault, lasting in ((disk_full, True), (broken_disk, False)):
            if trials is not None and lasting == bool(number % 2):
                continue
            config = replace(uninterrupted.config, output_dir=next(output_dirs))
            disk = Disk(number, fault, lasting=lasting)
            try:
                with disk.watched():
                    train(config)
            except UserError as problem:
                assert "\n" not in str(problem) and ("No space left" in str(problem) or "Input/output" in str(problem))
            assert disk.operations > number
            assert_nothing_is_lost(config)
            finish(config)
            assert_same_result(config, uninterrupted)


@forking
@pytest.mark.parametrize("trials", STOPS)
def test_terminated_at_any_moment(uninterrupted: Uninterrupted, output_dirs: Iterator[Path], trials: int) -> None:
    runs, draw = uninterrupted.runs, random.Random(trials)
    codes = []
    for _ in range(trials):
        config = replace(uninterrupted.config, output_dir=next(output_dirs), checkpointing_steps=100)
        process = runs.start(config)
        wait_for((config.output_dir / "status.json").exists)
        steps = draw.randrange(config.max_train_steps or 0)
        wait_for(lambda config=config, steps=steps: finished_steps(config) >= steps)  # type: ignore[misc]
        time.sleep(draw.uniform(0.0, uninterrupted.seconds / 12))
        os.kill(process, signal.SIGTERM)
        codes.append(exit_code(process))
        if codes[-1] == 143:
            # Complete: of the last step that was finished, without any other checkpoint to help.
            steps = finished_steps(config)
            assert newest_whole_step(config) == steps
            assert (config.output_dir / "adapter.safetensors").exists() == (steps > 0)
            finish(config, runs)
        assert_same_result(config, uninterrupted)
    assert set(codes) <= {0, 143} and codes.count(143) >= trials * 0.8


def finished_steps(config: TrainingConfig) -> int:
    rows = read_metrics(config.output_dir / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


@pytest.mark.slow
@pytest.mark.parametrize("by_signal", [True, False])
@pytest.mark.skipif(sys.platform == "win32", reason="one process gets the signal")
def test_several_processes_stop_after_the_same_step(tmp_path: Path, by_signal: bool) -> None:
    """Only one of the two is asked to end."""
    config = replace(short_run(tmp_path), max_train_steps=2000, checkpointing_steps=10_000, history_steps=0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(REPOSITORY / "train_dreambooth.py"), *arguments(config, history_steps=0)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=tmp_path)
        try:
            wait_for(lambda: finished_steps(config) >= 3 or process.poll() is not None, seconds=200.0)
            if by_signal:
                told = json.loads((config.output_dir / "status.json").read_text(encoding="utf-8"))
                os.kill(told["pid"], signal.SIGTERM)
            else:
                (config.output_dir / "stop").touch()
            code = process.wait(timeout=100)
        finally:
            process.kill()
    said = log.read_text(encoding="utf-8", errors="replace")
    assert (code != 0) == by_signal, said
    assert not by_signal or said.count("exitcode  : 143") + said.count("exitcode: 143") >= 1, said
    assert newest_whole_step(config) == finished_steps(config) >= 3, said
    assert said.count("all saved in") == 1, said


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingConfig, dict[str, bytes], int]:
    """A run with class images, previews, accumulation and several passes; its files; the number of its micro-steps."""
    folder = tmp_path_factory.mktemp("eventful")
    config = replace(
        short_run(folder),
        with_prior_preservation=True,
        class_prompt="a photo of a dog",
        class_data_dir=folder / "class",
        num_class_images=3,
        sample_batch_size=2,
        prior_generation_num_inference_steps=2,
        validation_prompt=PROMPT,
        num_validation_images=1,
        validation_steps=2,
        gradient_accumulation_steps=3,
        checkpoints_total_limit=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        moments = stopped_at(None, patch)
        train(config)
    return config, result_files(config), len(moments)


def stopped_at(moment: int | None, patch: pytest.MonkeyPatch) -> list[str]:
    """Raise SIGTERM at one of the moments of a run; all that pass are listed, by what the run is doing."""
    moments: list[str] = []
    enter, losses = status.RunStatus.enter, step.denoising_losses

    def pass_moment(name: str) -> None:
        moments.append(name)
        if len(moments) - 1 == moment:
            signal.raise_signal(signal.SIGTERM)

    def watched_enter(told: status.RunStatus, state: str) -> None:
        enter(told, state)
        pass_moment(state)

    def watched_losses(*positional: Any, **named: Any) -> Any:
        pass_moment("forward pass")
        return losses(*positional, **named)

    patch.setattr(status.RunStatus, "enter", watched_enter)
    patch.setattr(step, "denoising_losses", watched_losses)
    return moments


def result_files(config: TrainingConfig) -> dict[str, bytes]:
    folders = (config.output_dir, config.output_dir / "history", config.output_dir / "samples")
    named = {
        path for folder in folders for path in folder.iterdir() if path.suffix in (".safetensors", ".png", ".jsonl")
    }
    return {path.relative_to(config.output_dir).as_posix(): path.read_bytes() for path in named}


@pytest.mark.parametrize("trials", MICRO_STEPS)
def test_stopped_at_micro_steps(
    eventful: tuple[TrainingConfig, dict[str, bytes], int], output_dirs: Iterator[Path], trials: int
) -> None:
    """In the midst of an accumulation, at the edge of a pass, while class images or previews are drawn."""
    original, expected, moments = eventful
    met = set()
    for moment in sorted(random.Random(trials).sample(range(moments), trials)):
        folder = next(output_dirs)
        config = replace(original, output_dir=folder / "out", class_data_dir=folder / "class")
        with pytest.MonkeyPatch.context() as patch:
            passed = stopped_at(moment, patch)
            with pytest.raises(Interrupted) as request:
                train(config)
        assert request.value.exit_code == 143
        met.add(passed[moment])
        finish(config)
        assert result_files(config) == expected, passed[moment]
    assert len(met) > 1
