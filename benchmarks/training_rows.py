"""What was measured of training runs, kept row by row, and the tables of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from benchmarks.adapters.timing import median_ratio
from benchmarks.training_contenders import CONTENDERS, PEERS, Case
from svft_diffusion.files.whole_files import replace_when_whole

LARGEST_TIME = 1.05  # of LoRA's, with latents of 64 x 64
LARGEST_MEMORY = {1: 1.15, 4: 1.0}  # by batch size


class Results:
    """Rows by what they were measured under, in a file that is brought up to date after each."""

    def __init__(self, path: Path, *, rounds: int, threads: int) -> None:
        self._path = path
        self._circumstances: dict[str, Any] = {
            "torch": torch.__version__,
            "peft": peft.__version__,
            "machine": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": threads,
        }
        self._rounds = rounds
        self._rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self._rows = json.loads(path.read_text(encoding="utf-8"))

    def find(self, quantity: str, case: Case, name: str) -> dict[str, Any] | None:
        """A row, or None where nobody has measured it under these circumstances."""
        row = self._rows.get(self._key(quantity, case, name))
        return None if row is None else row["measured"]

    def put(self, quantity: str, case: Case, name: str, measured: dict[str, Any]) -> None:
        """Keep a row."""
        row = {**self._content(quantity, case, name), "measured": measured}
        self._rows[self._key(quantity, case, name)] = row
        with replace_when_whole(self._path) as unfinished:
            unfinished.write_text(json.dumps(self._rows, indent=1), encoding="utf-8")
        print(json.dumps(row), flush=True)

    def _content(self, quantity: str, case: Case, name: str) -> dict[str, Any]:
        rounds = {"rounds": self._rounds} if quantity == "time" else {}
        settings = dataclasses.asdict(case) | dataclasses.asdict(CONTENDERS[name])
        return {"quantity": quantity, "contender": name, **settings, **rounds, **self._circumstances}

    def _key(self, quantity: str, case: Case, name: str) -> str:
        content = json.dumps(self._content(quantity, case, name), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def table(results: Results, case: Case, names: Sequence[str]) -> str:
    """A Markdown table of one case; each ratio is to the LoRA on the same layers."""
    columns = ["s/step", "peak GB", "beyond base GB", "without mapped files GB", "tensors GB"]
    head = "".join(f" {column} | of LoRA's |" for column in columns)
    lines = [f"{case}", "", f"| |{head}", "| --- |" + " --- |" * 2 * len(columns)]
    for name in names:
        peer = PEERS[CONTENDERS[name].targets]
        cells = [*_time_cells(results, case, name, peer), *_memory_cells(results, case, name, peer)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if case.resolution == 512:
        memory = LARGEST_MEMORY.get(case.batch_size, "")
        lines.append(f"| bar | | {LARGEST_TIME} | | {memory} | | | | | | {memory} |")
    return "\n".join(lines)


def _time_cells(results: Results, case: Case, name: str, peer: str) -> list[str]:
    own, other = results.find("time", case, name), results.find("time", case, peer)
    if own is None:
        return ["", ""]
    ratio = "" if other is None else f"{median_ratio(own['seconds'], other['seconds']):.3f}"
    return [f"{statistics.median(own['seconds']):.2f}", ratio]


def _memory_cells(results: Results, case: Case, name: str, peer: str) -> list[str]:
    own, other = results.find("memory", case, name), results.find("memory", case, peer)
    if own is None:
        return [""] * 8
    cells = []
    for quantity in ("peak", "beyond base", "without mapped files", "tensors"):
        size, of_other = (None if row is None else _gigabytes(row, quantity) for row in (own, other))
        cells.append("" if size is None else f"{size:.2f}")
        cells.append("" if size is None or of_other is None else f"{size / of_other:.3f}")
    return cells


def _gigabytes(row: dict[str, Any], quantity: str) -> float | None:
    """None for the tensors on an accelerator, whose peak is theirs."""
    if quantity == "tensors":
        return row["tensors"] / 1e9 if "tensors" in row else None
    less = {"beyond base": "base", "without mapped files": "mapped files"}.get(quantity)
    bytes_: int = row["peak"] - (row[less] if less else 0)
    return bytes_ / 1e9
