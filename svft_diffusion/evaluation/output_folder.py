"""What an output folder holds already: a report that may go on, or files that are not ours to replace."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.preparation import PreparedSubject
from svft_diffusion.evaluation.report import REPORT_FILE, EvaluationReport, read_report
from svft_diffusion.evaluation.report_page import PAGE_FILE
from svft_diffusion.sampling.png import is_damaged_png, read_png_settings

_OVERVIEW = re.compile(rf"(pareto|pareto_.+|sheet_.+|strip_.+)\.png|{re.escape(PAGE_FILE)}")


def holds_this_report(output_dir: Path, settings: dict[str, Any], subjects: Sequence[PreparedSubject]) -> bool:
    """Whether a report is there that this evaluation repeats, or goes on, as that of a run with more steps by now.

    Raises:
        UserError: a report of another evaluation is there, or a file of a name that this one writes.
    """
    file = output_dir / REPORT_FILE
    if file.exists():
        try:
            is_same = _goes_on(read_report(file), settings, subjects)
        except UserError:
            is_same = False
        if not is_same:
            raise UserError(
                f"{file} is of another evaluation; choose another --output_dir, or replace it with --overwrite"
            )
        return True
    for path in sorted(output_dir.iterdir()) if output_dir.is_dir() else ():
        if _OVERVIEW.fullmatch(path.name) and not _is_sheet(path):
            raise UserError(
                f"{path} was not written by this command; choose another --output_dir, or replace it with --overwrite"
            )
    return False


def _goes_on(found: EvaluationReport, settings: dict[str, Any], subjects: Sequence[PreparedSubject]) -> bool:
    facts = [subject.facts({}) for subject in subjects]
    rows = {row for subject in subjects for row in subject.rows()}
    return (
        found.settings == settings
        and all(dataclasses.replace(subject, photo_scores={}) in facts for subject in found.subjects)
        and all((row.subject, row.label, row.sha256) in rows for row in found.rows)
    )


def _is_sheet(path: Path) -> bool:
    """Whether an evaluation that ended before its report wrote it."""
    if path.suffix != ".png":
        return False
    try:
        return is_damaged_png(path) or isinstance(read_png_settings(path).get("rows"), list)
    except UserError:
        return False
