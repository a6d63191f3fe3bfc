"""Trainings whose adapters can be measured, and the reports that there are of them."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from svft_diffusion.app.shelf.library_folder import files_below
from svft_diffusion.data.photos import UnusablePhoto, open_photo
from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.report import REPORT_FILE, EvaluationReport, read_report
from svft_diffusion.evaluation.report_page import ScoreTable, score_tables
from svft_diffusion.structured_files import read_structured
from svft_diffusion.training.card import CONFIG_FILE
from svft_diffusion.training.history import has_history, history_files

_MOST_REPORTS = 200
_MOST_PICTURES = 12
_PLOTS = ("pareto", "strip_", "sheet_")  # as they are shown
_REPORT = TypeAdapter(EvaluationReport)
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Run:
    """A training that has kept adapters of its steps.

    Attributes:
        id: of its place; the page names it by that.
        folder: its output folder.
        base: the base model that its settings name, if they are there.
    """

    id: str
    name: str
    folder: Path
    base: str | None


@dataclass(frozen=True)
class FoundReport:
    """A report that scores adapters of a run.

    Attributes:
        id: of its place.
        tables: its scores.
    """

    id: str
    folder: Path
    report: EvaluationReport
    tables: list[ScoreTable]

    @property
    def label(self) -> str:
        """What a list calls it."""
        settings = self.report.settings
        adapters = sum(row.step is not None for row in self.report.rows)
        pictures = sum(row.pictures for row in self.report.rows)
        kept = "1 adapter" if adapters == 1 else f"{adapters} adapters"
        return f"{self.folder.name}: {kept}, {pictures} pictures, {settings.get('num_inference_steps', '?')} steps each"

    def pictures(self) -> list[Path]:
        """Its plots and contact sheets, those that can be opened."""
        found = [file for start in _PLOTS for file in sorted(self.folder.glob(f"{start}*.png"), key=_in_order)]
        return [file for file in found[:_MOST_PICTURES] if _is_picture(file)]


def runs_below(folder: Path, names: Mapping[Path, str]) -> list[Run]:
    """The runs in a folder, the latest first.

    Args:
        names: what runs are called that are not called by their folders.
    """
    found = dict.fromkeys(one.run for one in files_below(folder) if one.run is not None)
    kept = [run for run in found if has_history(run)]
    kept.sort(key=_modified, reverse=True)
    return [Run(place_id(run), names.get(run, run.name), run, _base_of(run)) for run in kept]


def reports_of(run: Run, folder: Path) -> list[FoundReport]:
    """The reports of a run's adapters, the latest first: those in numbered folders of ``folder``, where the command
    puts them, and those in folders of the run."""
    kept = {digest for file in history_files(run.folder).values() if (digest := _digest(file)) is not None}
    files = [*folder.glob(f"*/{REPORT_FILE}"), *run.folder.glob(REPORT_FILE), *run.folder.glob(f"*/{REPORT_FILE}")]
    files.sort(key=_modified, reverse=True)
    found = [_read(file) for file in files[:_MOST_REPORTS]]
    return [one for one in found if one is not None and any(row.sha256 in kept for row in one.report.rows)]


def place_id(folder: Path) -> str:
    """A name for a folder that tells nothing of where it lies."""
    return hashlib.sha256(folder.as_posix().encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _modified(path: Path) -> float:
    """When; long ago, if it has gone in the meantime."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _digest(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None


def _read(file: Path) -> FoundReport | None:
    try:
        # A report is read as it comes: whatever shows it may rely on its types.
        report = _REPORT.validate_python(dataclasses.asdict(read_report(file)))
        return FoundReport(place_id(file.parent), file.parent, report, score_tables(report))
    except (UserError, ValidationError, KeyError):  # damaged
        return None


def _base_of(run: Path) -> str | None:
    try:
        settings = read_structured(run / CONFIG_FILE, "the settings")
    except UserError:
        return None
    base = settings.get("pretrained_model_name_or_path") if isinstance(settings, dict) else None
    return base if isinstance(base, str) else None


def _in_order(file: Path) -> list[int | str]:
    """Step 15 comes before step 105."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.stem)]


def _is_picture(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            if file.is_symlink() or opened.read(len(_SIGNATURE)) != _SIGNATURE:
                return False
        open_photo(file)
    except (OSError, UnusablePhoto):
        return False
    return True
