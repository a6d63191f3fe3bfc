"""What became of all rows: ``status.json`` while they train; at the end ``report.json``, ``report.md``, a picture."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from svft_diffusion.errors import UserError
from svft_diffusion.files import read_header
from svft_diffusion.files.training_folder import ADAPTER_FILE
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.markdown import plain, table
from svft_diffusion.sampling.grid import labelled_grid
from svft_diffusion.terminal import printable
from svft_diffusion.training.many.listing import Row
from svft_diffusion.training.many.record import FINISHED, STOPPED, TRAINING, Record
from svft_diffusion.training.status import STATUS_FILE

REPORT_JSON, REPORT_MARKDOWN, REPORT_PICTURE = "report.json", "report.md", "report.png"
_LARGEST_CELL = 256  # pixels
_MOST_PICTURES = 400


@dataclass(frozen=True)
class RowReport:
    """One row of the report; folders are told from the output folder."""

    number: int
    name: str
    state: str
    reason: str | None  # why it is not finished
    seconds: float  # of all attempts
    steps: int | None
    last_loss: float | None
    adapter_bytes: int | None
    trigger: str | None
    file: str | None
    sample: str | None


@dataclass(frozen=True)
class Savings:
    """What one base model for all has saved, over all attempts that reached a first step."""

    times_loaded: int
    seconds_loading: float
    seconds_before_first_step_with_loading: float | None  # mean of the rows that loaded the base model
    seconds_before_first_step_without: float | None  # mean of the others
    seconds_saved: float


@dataclass(frozen=True)
class Report:
    """All rows."""

    rows: list[RowReport]
    states: dict[str, int]
    seconds: float  # since this start of the command
    seconds_of_rows: float  # of all starts, and of all processes
    savings: Savings

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def make_report(rows: Sequence[tuple[Row, str, str | None, Record | None]], *, seconds: float) -> Report:
    """The report of rows with their states, the reasons of these, and their records."""
    lines = [_line(*row) for row in rows]
    return Report(
        rows=lines,
        states=dict(Counter(line.state for line in lines)),
        seconds=round(seconds, 2),
        seconds_of_rows=round(sum(line.seconds for line in lines), 2),
        savings=_savings([record for _, _, _, record in rows if record is not None]),
    )


def _line(row: Row, state: str, reason: str | None, record: Record | None) -> RowReport:
    record = record or Record({}, state)
    folder = row.config.output_dir
    adapter = folder / ADAPTER_FILE
    trigger, size = None, None
    if state in (FINISHED, STOPPED):
        with contextlib.suppress(UserError, OSError):  # stopped before there was one
            trigger, size = read_header(adapter).trigger, adapter.stat().st_size
    return RowReport(
        number=row.number,
        name=row.name,
        state=state,
        reason=reason,
        seconds=round(record.seconds, 2),
        steps=record.steps,
        last_loss=record.last_loss,
        adapter_bytes=size,
        trigger=trigger,
        file=None if size is None else f"{row.name}/{ADAPTER_FILE}",
        sample=None if record.sample is None else f"{row.name}/{record.sample}",
    )


def _savings(records: Sequence[Record]) -> Savings:
    prepared = [(record.preparation, record.loading) for record in records if record.preparation is not None]
    first = [preparation for preparation, loading in prepared if loading > 0]
    later = [preparation for preparation, loading in prepared if loading == 0]
    mean_first, mean_later = _mean(first), _mean(later)
    saved = 0.0 if mean_first is None or mean_later is None else (mean_first - mean_later) * len(later)
    return Savings(
        times_loaded=len(first),
        seconds_loading=round(sum(loading for _, loading in prepared), 2),
        seconds_before_first_step_with_loading=mean_first,
        seconds_before_first_step_without=mean_later,
        seconds_saved=round(max(0.0, saved), 2),
    )


def _mean(values: Sequence[float]) -> float | None:
    return round(math.fsum(values) / len(values), 3) if values else None


def write_report(report: Report, output_dir: Path) -> None:
    """Write the report in its three forms; the picture only where there are samples.

    Raises:
        UserError: the folder can't be written.
    """
    sheet = _sheet(report, output_dir)
    if sheet is not None:
        with replace_when_whole(output_dir / REPORT_PICTURE) as unfinished:
            sheet.save(unfinished, format="PNG")
    with replace_when_whole(output_dir / REPORT_JSON) as unfinished:
        unfinished.write_text(json.dumps(report.to_mapping(), indent=1) + "\n", encoding="utf-8")
    with replace_when_whole(output_dir / REPORT_MARKDOWN) as unfinished:
        text = _markdown(report, with_picture=sheet is not None)
        unfinished.write_text(text.encode("utf-8", "replace").decode("utf-8"), encoding="utf-8")


def _sheet(report: Report, output_dir: Path) -> Image.Image | None:
    """The first of the last samples of every row, with the rows' names above."""
    tiles: list[tuple[Image.Image, str]] = []
    for line in report.rows[:_MOST_PICTURES]:
        if line.sample is None:
            continue
        with contextlib.suppress(OSError), Image.open(output_dir / line.sample) as image:  # somebody tidied up
            tiles.append((image.convert("RGB"), printable(line.name)))
    if not tiles:
        return None
    # Labels stand above columns, so that every row of pictures is a grid of its own, and all get the same cells.
    columns = max(1, math.ceil(len(tiles) ** 0.5))
    cell = min(_LARGEST_CELL, max(160, max(image.width for image, _ in tiles)))
    strips = []
    for start in range(0, len(tiles), columns):
        part = tiles[start : start + columns]
        strips.append(labelled_grid([[image for image, _ in part]], [""], [label for _, label in part], cell=cell))
    sheet = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _markdown(report: Report, *, with_picture: bool) -> str:
    savings = report.savings
    counted = ", ".join(f"{count} {state}" for state, count in report.states.items())
    parts = [
        "# Subjects",
        f"{counted}; this start took {report.seconds:.0f} s, all rows in all starts {report.seconds_of_rows:.0f} s.",
        f"The base model was loaded {'once' if savings.times_loaded == 1 else f'{savings.times_loaded} times'}, in "
        f"{savings.seconds_loading:.1f} s. " + _saved_in_words(savings),
        f"![samples]({REPORT_PICTURE})" if with_picture else "",
        table(
            ["row", "name", "state", "seconds", "steps", "last loss", "adapter", "trigger", "file"],
            (_cells(line) for line in report.rows),
        ),
    ]
    reasons = [f"- {plain(line.name)}: {plain(line.reason)}" for line in report.rows if line.reason]
    if reasons:
        parts += ["## Not finished", "\n".join(reasons)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _saved_in_words(savings: Savings) -> str:
    first, later = savings.seconds_before_first_step_with_loading, savings.seconds_before_first_step_without
    if first is None or later is None:
        return ""
    return (
        f"A row that loaded it took {first:.1f} s before its first step (loading, decompositions, shared class "
        f"pictures), the others {later:.1f} s on average, which saved about {savings.seconds_saved:.0f} s."
    )


def _cells(line: RowReport) -> list[str]:
    return [
        str(line.number),
        plain(line.name),
        line.state,
        f"{line.seconds:.1f}",
        "" if line.steps is None else str(line.steps),
        "" if line.last_loss is None else f"{line.last_loss:.4f}",
        "" if line.adapter_bytes is None else f"{line.adapter_bytes / 1000:.1f} kB",
        plain(line.trigger or ""),
        plain(line.file or ""),
    ]


def write_status(output_dir: Path, states: Sequence[tuple[str, str]], *, state: str, started: float) -> None:
    """Say in ``status.json`` what ``state`` the command is in, and every row.

    A process that can't write it trains on; others write it too, each time one of theirs changes its state.
    """
    status = {
        "state": state,
        "now": [name for name, row_state in states if row_state == TRAINING],
        "counts": dict(Counter(row_state for _, row_state in states)),
        "rows": dict(states),
        "pid": os.getpid(),
        "started": started,
        "updated": time.time(),
    }
    with contextlib.suppress(UserError), replace_when_whole(output_dir / STATUS_FILE, flush=False) as unfinished:
        unfinished.write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")


def exit_code_of(report: Report) -> int:
    """1 if a row is not finished; what was stopped on request is no failure."""
    return 0 if report.states.keys() <= {FINISHED, STOPPED} else 1
