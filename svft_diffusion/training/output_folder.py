"""The output folder at the start of a run: what killed runs left in it goes, what failed ones achieved stays."""

from __future__ import annotations

from pathlib import Path

from svft_diffusion.errors import UserError
from svft_diffusion.files.training_folder import METRICS_FILE, SAMPLES_FOLDER
from svft_diffusion.files.whole_files import remove_unfinished
from svft_diffusion.training.failure import FAILURE_FILE
from svft_diffusion.training.history import HISTORY_FOLDER, has_history


def prepare_folder(output_dir: Path, first_step: int) -> list[str]:
    """Make the folder ready for a run that goes on from ``first_step``; what to tell the user.

    Raises:
        UserError: it can't be written.
    """
    try:
        return _prepare(output_dir, first_step)
    except OSError as problem:
        raise UserError(f"can't write to {output_dir}: {problem.strerror or problem}") from problem


def _prepare(output_dir: Path, first_step: int) -> list[str]:
    output_dir.mkdir(parents=True, exist_ok=True)
    for folder in (output_dir, output_dir / HISTORY_FOLDER, output_dir / SAMPLES_FOLDER):
        remove_unfinished(folder)
    (output_dir / FAILURE_FILE).unlink(missing_ok=True)
    if first_step > 0 or not has_history(output_dir):
        return []
    aside = _set_aside(output_dir)
    return [f"an earlier run ended before its first checkpoint; the adapters that it kept are in {aside} now"]


def _set_aside(output_dir: Path) -> Path:
    """Give the traces of an earlier run a folder of their own: its steps are not those of the new one."""
    number = 1
    while (aside := output_dir / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    for name in (METRICS_FILE, SAMPLES_FOLDER, HISTORY_FOLDER):
        if (output_dir / name).exists():
            (output_dir / name).rename(aside / name)
    return aside
