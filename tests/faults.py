"""Things that happen to a run: it is killed, asked to end, or its disk fails, each at a place that a test chooses."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from PIL import Image

from svft_diffusion.errors import Interrupted, UserError
from svft_diffusion.files import read_adapter
from svft_diffusion.training import setup
from svft_diffusion.training.checkpoints import existing_checkpoints, load_checkpoint_state, remove_leftovers, step_of
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.metrics import read_metrics
from svft_diffusion.training.trainer import train


class Disk:
    """Counts what a run does to the disk, and lets something happen at one of these operations.

    Args:
        at: number of the operation, from 0; None: nothing happens.
        fault: called in the midst of it, when half of what is to be written is there.
        lasting: whether it happens at every later operation too.
    """

    def __init__(self, at: int | None, fault: Callable[[], None], *, lasting: bool = False) -> None:
        self.operations = 0
        self._at = at
        self._fault = fault
        self._lasting = lasting

    @property
    def _strikes(self) -> bool:
        number, self.operations = self.operations, self.operations + 1
        return self._at is not None and (number == self._at or (self._lasting and number > self._at))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Count, and let it happen, while this is entered."""
        write_bytes, write_text, save, path_open = Path.write_bytes, Path.write_text, Image.Image.save, Path.open
        disk = self

        def failing_write_bytes(path: Path, data: bytes) -> int:
            if disk._strikes:
                write_bytes(path, data[: len(data) // 2])
                disk._fault()
            return write_bytes(path, data)

        def failing_write_text(path: Path, data: str, **options: Any) -> int:
            if disk._strikes:
                write_text(path, data[: len(data) // 2], **options)
                disk._fault()
            return write_text(path, data, **options)

        def failing_save(image: Image.Image, file: Path, *positional: Any, **options: Any) -> None:
            if isinstance(file, Path) and disk._strikes:
                write_bytes(file, b"\x89PNG half")
                disk._fault()
            save(image, file, *positional, **options)

        def failing_open(path: Path, mode: str = "r", *positional: Any, **options: Any) -> Any:
            file = path_open(path, mode, *positional, **options)
            return _FailingFile(file, disk) if mode == "a" else file

        def failing(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*positional: Any, **options: Any) -> Any:
                if disk._strikes:
                    disk._fault()
                return function(*positional, **options)

            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "write_bytes", failing_write_bytes)
            patch.setattr(Path, "write_text", failing_write_text)
            patch.setattr(Image.Image, "save", failing_save)
            patch.setattr(Path, "open", failing_open)
            for name in ("fsync", "replace", "rename", "mkdir"):
                patch.setattr(os, name, failing(getattr(os, name)))
            yield


class _FailingFile:
    """A text file that is written line by line."""

    def __init__(self, file: TextIO, disk: Disk) -> None:
        self._file = file
        self._disk = disk

    def write(self, text: str) -> int:
        if self._disk._strikes:
            self._file.write(text[: len(text) // 2])
            self._file.flush()
            self._disk._fault()
        return self._file.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def disk_full() -> None:
    raise OSError(28, "No space left on device")


def broken_disk() -> None:
    raise OSError(5, "Input/output error")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class ForkedRuns:
    """Runs in forked processes, which find the base model loaded already. Linux only.

    Args:
        pipeline: the base model, which no run in this process may touch.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def start(self, config: TrainingConfig, disk: Disk | None = None) -> int:
        """Begin a run and return its process id; it exits with 0, 2, or what a request to end it says."""
        process = os.fork()
        if process:
            return process
        code = 99
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            setup.load_base = lambda config, dtype: self._pipeline  # type: ignore[assignment]
            with disk.watched() if disk is not None else contextlib.nullcontext():
                train(config)
            code = 0
        except UserError:
            code = 2
        except Interrupted as request:
            code = request.exit_code
        except BaseException as problem:
            Path(f"{config.output_dir}.error").write_text(repr(problem), encoding="utf-8")
        finally:
            os._exit(code)

    def run(self, config: TrainingConfig, disk: Disk | None = None) -> int:
        """The exit code of a whole run, negative for a signal that ended it."""
        return exit_code(self.start(config, disk))


def exit_code(process: int) -> int:
    """Wait for a process to end; negative for a signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until ``condition`` holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.001)


def newest_whole_step(config: TrainingConfig) -> int:
    """Of the checkpoints; 0 without one. All others but the newest must be whole too."""
    remove_leftovers(config.output_dir)
    steps = []
    for checkpoint in existing_checkpoints(config.output_dir):
        load_checkpoint_state(checkpoint)
        steps.append(step_of(checkpoint))
    return max(steps, default=0)


def assert_nothing_is_lost(config: TrainingConfig) -> int:
    """The newest checkpoint verifies and is at most an interval behind the last step that was finished; its step."""
    rows = read_metrics(config.output_dir / "metrics.jsonl")
    finished = rows[-1]["step"] if rows else 0
    newest = newest_whole_step(config)
    # The last step may have been killed in the midst of its checkpoint; the one before has its checkpoint.
    assert newest >= max(0, finished - 1) // config.checkpointing_steps * config.checkpointing_steps
    for file in config.output_dir.glob("history/step-*.safetensors"):
        assert_adapter_loads(file)
    return newest


def assert_adapter_loads(file: Path) -> None:
    assert read_adapter(file)[1]


def litter(folder: Path) -> list[str]:
    """Names of files that nobody will need."""
    return [path.name for path in folder.rglob("*") if path.name.startswith(".")]
