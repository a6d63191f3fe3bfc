"""What a run writes about its steps: ``metrics.jsonl`` with their numbers, ``freezing.jsonl`` with what froze when.

The numbers also go to TensorBoard or W&B where they are wanted and installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import TextIO

from accelerate import Accelerator

from svft_diffusion.adapters.freezing import AdaptiveVectorFreezing

METRICS_FILE = "metrics.jsonl"
FREEZING_FILE = "freezing.jsonl"


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


class MetricsLog:
    """One line of JSON for each optimizer step; of an earlier run, the lines up to ``first_step`` are kept."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, first_step: int) -> None:
        self._accelerator = accelerator
        self._file: TextIO | None = None
        if accelerator.is_main_process:
            path = output_dir / METRICS_FILE
            kept = _lines_until(path, first_step)
            self._file = path.open("w", encoding="utf-8")
            self._file.writelines(kept)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the numbers of one step."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._accelerator.trackers:
            self._accelerator.log(values, step=step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


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
        self._path.write_text("".join(rows), encoding="utf-8")


def _lines_until(path: Path, step: int) -> list[str]:
    if step == 0 or not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # the last line of a killed run may be half a line
            continue
    return kept
