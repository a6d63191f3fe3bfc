"""What a run writes about its steps: ``metrics.jsonl`` with their numbers, ``freezing.jsonl`` with what froze when.

The numbers also go to TensorBoard or W&B where they are wanted and installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from accelerate import Accelerator

from svft_diffusion.adapters.freezing import AdaptiveVectorFreezing
from svft_diffusion.errors import UserError
from svft_diffusion.files.training_folder import METRICS_FILE
from svft_diffusion.files.whole_files import replace_when_whole

FREEZING_FILE = "freezing.jsonl"
LAST_LOSSES = 50  # that a failure report tells
_SMOOTHING = 0.98


def available_tracker(report_to: str) -> tuple[str | None, str]:
    """(tracker to use, what to tell the user): a missing package costs the curves, not the run."""
    if report_to == "none":
        return None, ""
    if importlib.util.find_spec(report_to) is None:
        return (
            None,
            f"{report_to} is not installed, so there are no curves (pip install {report_to}); metrics.jsonl is written",
        )
    return report_to, ""


def start_tracker(accelerator: Accelerator, report_to: str) -> None:
    """Begin the curves.

    Raises:
        UserError: the package does not work, such as W&B without a login.
    """
    try:
        accelerator.init_trackers("svft-diffusion")
    except Exception as problem:  # the package's own, of any kind
        accelerator.trackers = []  # what has not begun can't be ended
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise UserError(f"--report_to {report_to} does not work here ({reason}); try --report_to none") from problem


class MetricsLog:
    """One line of JSON for each optimizer step; of an earlier run, the lines up to ``first_step`` are kept."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, first_step: int) -> None:
        self._accelerator = accelerator
        self._path = output_dir / METRICS_FILE
        self._file: TextIO | None = None
        self._losses: deque[float] = deque(maxlen=LAST_LOSSES)
        self._sum, self._weight = 0.0, 0.0  # of the moving average
        if accelerator.is_main_process:
            kept = _rows_until(self._path, first_step)
            for row in kept:
                self._smooth(row["loss"])
            with replace_when_whole(self._path) as unfinished:
                unfinished.write_text("".join(map(_line, kept)), encoding="utf-8")
            try:
                self._file = self._path.open("a", encoding="utf-8")
            except OSError as problem:
                raise self._unwritable(problem) from problem

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # every line was flushed, or its failure was told
                self._file.close()

    @property
    def smoothed_loss(self) -> float:
        """Mean loss of about the last fifty steps, the latest counting most; NaN before the first."""
        return self._sum / self._weight if self._weight else math.nan

    @property
    def last_losses(self) -> list[float]:
        """Of the last steps, the latest last."""
        return list(self._losses)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the numbers of one step, and the smoothed loss.

        Raises:
            UserError: the disk is full, or broken.
        """
        self._smooth(values["loss"])
        values = values | {"smoothed_loss": self.smoothed_loss}
        if self._file is not None:
            try:
                self._file.write(_line({"step": step, **values}))
                self._file.flush()
            except OSError as problem:
                raise self._unwritable(problem) from problem
        if self._accelerator.trackers:
            self._accelerator.log(values, step=step)

    def _unwritable(self, problem: OSError) -> UserError:
        return UserError(f"can't write {self._path}: {problem.strerror or problem}")

    def _smooth(self, loss: float) -> None:
        self._losses.append(loss)
        self._sum = _SMOOTHING * self._sum + (1 - _SMOOTHING) * loss
        self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)


class FreezingLog:
    """``freezing.jsonl``: one line of JSON for each window of adaptive vector freezing, from the first step on."""

    def __init__(self, output_dir: Path, freezing: AdaptiveVectorFreezing | None) -> None:
        self._path = output_dir / FREEZING_FILE
        self._freezing = freezing
        self._lines = 0

    def write(self) -> None:
        """Bring the file up to date; without freezing there is none."""
        if self._freezing is None or len(self._freezing.log) == self._lines:
            return
        self._lines = len(self._freezing.log)
        rows = [json.dumps(dataclasses.asdict(window)) + "\n" for window in self._freezing.log]
        with replace_when_whole(self._path) as unfinished:
            unfinished.write_text("".join(rows), encoding="utf-8")


def _line(row: dict[str, Any]) -> str:
    """JSON knows no infinity, which the gradient's norm can be with fp16 in a step that is left out."""
    infinite = {key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps(row | dict.fromkeys(infinite)) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; the last line of a killed run may be half a line, and is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("loss"), float):
            rows.append(row)
    return rows


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    return [row for row in read_metrics(path) if row["step"] <= step] if step else []
