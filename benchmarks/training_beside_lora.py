"""A whole training run beside LoRA in the same loop: Stable Diffusion 1.5's geometry with random weights.

    python -m benchmarks.training_beside_lora                                     # batch 1, float32
    python -m benchmarks.training_beside_lora --measure memory --batch_sizes 4 --precisions bf16

Everybody is trained by `svft_diffusion.training.trainer.train` on cached latents; PEFT's LoRA of rank 4 takes the
adapter's place in it. Time is that of the whole loop from one step to the next: all runs are in one process over one
set of base weights and take turns, and what counts is the median ratio of the rounds. Memory is the peak of the first
step in a process of its own; on the CPU, the second step's tensors are counted, which are what an accelerator would
hold. The base lies in files of the runs' precision, as checkpoints do, with values that all precisions share. What was
measured is kept in ``results.json``, row by row, and not measured again.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from diffusers import DiffusionPipeline
from torch import nn

from benchmarks.adapters.contenders import modules_over_shared_weights
from benchmarks.device_bytes import DeviceBytes
from benchmarks.random_pipelines import write_stable_diffusion_15
from benchmarks.training_contenders import CONTENDERS, Case, as_contender
from benchmarks.training_rows import Results, table
from svft_diffusion.cli.arguments import Parser, add_settings, config_from_options
from svft_diffusion.errors import UserError
from svft_diffusion.settings import setting
from svft_diffusion.training import run as training_run
from svft_diffusion.training import setup, trainer
from svft_diffusion.training.batches import Batch
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.memory import forget_peak, peak_memory
from svft_diffusion.training.run import Run
from svft_diffusion.training.step import optimizer_step
from svft_diffusion.training.trainer import StepReport

_PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class BesideConfig:
    """What to measure, and how often."""

    output_dir: Path = setting(Path("outputs/training_beside_lora"), "base model, singular factors and results.json")
    instance_data_dir: Path = setting(Path("samples"), "photos")
    measure: list[str] = setting(["time", "memory"], "time, memory, or both")
    contenders: list[str] = setting(list(CONTENDERS), f"of {'; '.join(CONTENDERS)}")
    batch_sizes: list[int] = setting([1], "photos in a batch")
    precisions: list[str] = setting(["no"], f"--mixed_precision of the runs, of {', '.join(_PRECISIONS)}")
    gradient_checkpointing: list[str] = setting(["off"], "off, on, or both")
    resolution: int = setting(512, "side of the photos; the latents have an eighth of it")
    rounds: int = setting(3, "timed steps of everybody, after one that warms up")
    threads: int = setting(1, "CPU threads; with one, time is the thread's own, which other programs disturb little")

    def __post_init__(self) -> None:
        for name, allowed in (
            ("measure", ("time", "memory")),
            ("contenders", tuple(CONTENDERS)),
            ("precisions", _PRECISIONS),
            ("gradient_checkpointing", ("off", "on")),
        ):
            for given in getattr(self, name):
                if given not in allowed:
                    raise UserError(f"--{name}: unknown {given!r}; choose from {', '.join(allowed)}")
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")

    @property
    def cases(self) -> list[Case]:
        """Every combination of the settings that a run is measured under."""
        return [
            Case(batch, precision, checkpointing == "on", self.resolution)
            for batch, precision, checkpointing in itertools.product(
                self.batch_sizes, self.precisions, self.gradient_checkpointing
            )
        ]


class _Enough(UserError):
    """Ends a run that was measured; as a `UserError` it leaves no failure report."""


def main(arguments: Sequence[str]) -> None:
    """Measure what is not in the results yet, and print a table for each case."""
    parser = Parser(prog="python -m benchmarks.training_beside_lora", description=__doc__)
    add_settings(parser, BesideConfig)
    config = config_from_options(BesideConfig, parser.parse_args(arguments))
    torch.set_num_threads(config.threads)
    for precision in config.precisions:
        _write_base(config, precision)
    results = Results(config.output_dir / "results.json", rounds=config.rounds, threads=config.threads)
    for case in config.cases:
        if "memory" in config.measure:
            for name in config.contenders:
                if results.find("memory", case, name) is None:
                    results.put("memory", case, name, _memory(config, case, name))
        if "time" in config.measure:
            missing = [name for name in config.contenders if results.find("time", case, name) is None]
            if missing:  # ratios need everybody in the same rounds
                for name, row in _times(config, case).items():
                    results.put("time", case, name, row)
        print(table(results, case, config.contenders), flush=True)


def training(config: BesideConfig, case: Case, name: str) -> TrainingConfig:
    """The run of a contender; it is ended before it comes to its last step."""
    contender = CONTENDERS[name]
    return TrainingConfig(
        pretrained_model_name_or_path=str(_base(config, case.precision)),
        instance_data_dir=config.instance_data_dir,
        instance_prompt="a photo of sks dog",
        output_dir=config.output_dir / "run" / hashlib.sha256(f"{name}|{case}".encode()).hexdigest()[:16],
        resolution=case.resolution,
        train_batch_size=case.batch_size,
        mixed_precision=case.precision,
        gradient_checkpointing=case.checkpointing,
        targets=contender.targets,
        max_train_steps=100_000,
        checkpointing_steps=100_000,
        history_steps=0,
        report_to="none",
        encoding_cache=config.output_dir / "encodings",
        factor_cache=config.output_dir / "factors",
        **contender.settings,
    )


# Memory


def _memory(config: BesideConfig, case: Case, name: str) -> dict[str, Any]:
    """Bytes of a run in a fresh process."""
    # What is freed goes back to the system at once (glibc); otherwise the peak counts some of it twice.
    with _fresh_process({"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}) as process:
        return process.submit(memory_of_run, config, case, name).result()


@contextlib.contextmanager
def _fresh_process(environment: Mapping[str, str]) -> Iterator[ProcessPoolExecutor]:
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(1, mp_context=spawn) as process:
        yield process


def memory_of_run(config: BesideConfig, case: Case, name: str) -> dict[str, Any]:
    """Peaks of this process, what it held before there was an adapter, and what an accelerator would hold."""
    torch.set_num_threads(config.threads)
    device = _device()
    held: dict[str, int] = {}

    def on_base() -> None:
        gc.collect()
        held["base"] = _held(device)

    def step(run: Run, batches: Iterator[Batch], number: int) -> dict[str, float]:
        if number == 1:
            _forget_peak(device)  # of loading and encoding
            metrics = optimizer_step(run, batches, number)
            held["peak"], held["mapped files"] = _peak_since_forgotten(device), _mapped_files()
            return metrics
        with DeviceBytes(run.models.values()) as counted:
            metrics = optimizer_step(run, batches, number)
        held["tensors"], held["tensors before"] = counted.before + counted.peak, counted.before
        return metrics

    def on_step(report: StepReport) -> None:
        if report.step == 2 or device.type != "cpu":
            raise _Enough

    with (
        as_contender(name, on_base),
        mock.patch.object(trainer, "optimizer_step", step),
        contextlib.suppress(_Enough),
    ):
        trainer.train(training(config, case, name), on_step=on_step)
    return {**held, "peak of process": peak_memory(torch.device("cpu"))}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _forget_peak(device: torch.device) -> None:
    forget_peak(device)
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_since_forgotten(device: torch.device) -> int:
    if device.type == "cuda" or sys.platform != "linux":
        return peak_memory(device)
    return _status("VmHWM")


def _mapped_files() -> int:
    """Bytes of files in memory (singular factors, libraries), which the system may drop and read again."""
    return _status("RssFile") if sys.platform == "linux" else 0


def _status(name: str) -> int:
    """Bytes, from what Linux tells of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# Time


def _times(config: BesideConfig, case: Case) -> dict[str, dict[str, Any]]:
    """Seconds of everybody's steps."""
    # With a heap for each thread (glibc), every run would keep the memory that its last step has freed.
    with _fresh_process({"MALLOC_ARENA_MAX": "1"}) as process:
        return process.submit(times_in_turns, config, case).result()


def times_in_turns(config: BesideConfig, case: Case) -> dict[str, dict[str, Any]]:
    """Everybody trains in this process, a step at a time."""
    torch.set_num_threads(config.threads)
    clock = time.thread_time if config.threads == 1 and _device().type == "cpu" else time.perf_counter
    shared = _SharedBase()
    runs = {name: _TurnTaker(training(config, case, name), clock) for name in config.contenders}
    try:
        for name, run in runs.items():
            # Nobody parks a weight that others read.
            with (
                as_contender(name),
                mock.patch.object(setup, "load_base", shared.load),
                mock.patch.object(training_run, "parkable_layers", lambda models: []),
            ):
                run.start()
                run.turn()  # prepares, and takes a first step
            print(f"{case}: {name} is ready", flush=True)
        for turn in range(config.rounds):
            names = list(runs)
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                runs[name].turn()
                print(f"{case}: {name} {runs[name].seconds[-1]:.2f} s", flush=True)
    finally:
        for run in runs.values():
            run.end()
    return {name: {"seconds": run.seconds[1:]} for name, run in runs.items()}


class _SharedBase:
    """Loads the base model once; every pipeline has a denoiser of its own over the same weights."""

    def __init__(self) -> None:
        self._pipeline: DiffusionPipeline | None = None
        self._load = setup.load_base

    def load(self, config: TrainingConfig, dtype: torch.dtype) -> DiffusionPipeline:
        """In the place of `load_base`."""
        if self._pipeline is None:
            self._pipeline = self._load(config, dtype)
            for component in self._pipeline.components.values():
                if isinstance(component, nn.Module):
                    component.requires_grad_(False)
        components = dict(self._pipeline.components)
        components["unet"] = modules_over_shared_weights(components["unet"])
        return type(self._pipeline)(**components, requires_safety_checker=False)


class _TurnTaker(threading.Thread):
    """A run that does one step whenever it is told to, and stands still in between."""

    def __init__(self, config: TrainingConfig, clock: Callable[[], float]) -> None:
        super().__init__(daemon=True)
        self.seconds: list[float] = []  # of the first one, everything before it included
        self._config, self._clock = config, clock
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._ends = False
        self._begun = 0.0
        self._problem: BaseException | None = None

    def turn(self) -> None:
        """Do one step, and what the trainer does between steps."""
        self._go.release()
        self._done.acquire()
        if self._problem is not None:
            raise self._problem

    def end(self) -> None:
        """Stop for good."""
        if self.is_alive():
            self._ends = True
            self._go.release()
            self.join()

    def run(self) -> None:
        """The thread."""
        self._go.acquire()
        try:
            if not self._ends:
                self._begun = self._clock()
                trainer.train(self._config, on_step=self._stepped)
        except _Enough:
            pass
        except BaseException as problem:
            self._problem = problem
        finally:
            self._done.release()

    def _stepped(self, report: StepReport) -> None:
        self.seconds.append(self._clock() - self._begun)
        self._done.release()
        self._go.acquire()
        if self._ends:
            raise _Enough
        self._begun = self._clock()


def _base(config: BesideConfig, precision: str) -> Path:
    name = "stable-diffusion-1.5-random"
    return config.output_dir / (f"{name}-float32" if precision == "no" else name)


def _write_base(config: BesideConfig, precision: str) -> None:
    rounded = _base(config, "bf16")
    write_stable_diffusion_15(rounded, dtype=torch.bfloat16)
    folder = _base(config, precision)
    if not (folder / "model_index.json").is_file():  # which is written last
        DiffusionPipeline.from_pretrained(rounded, torch_dtype=torch.float32).save_pretrained(folder)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
