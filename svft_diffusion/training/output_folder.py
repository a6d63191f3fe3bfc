"""The output folder at the start of a run: what killed runs left in it goes, what earlier ones achieved stays."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from svft_diffusion.errors import UserError
from svft_diffusion.files.training_folder import METRICS_FILE, SAMPLES_FOLDER
from svft_diffusion.files.whole_files import remove_unfinished
from svft_diffusion.training.checkpoints import existing_checkpoints, step_of
from svft_diffusion.training.failure import FAILURE_FILE
from svft_diffusion.training.history import HISTORY_FOLDER, has_history, history_files, sample_files

_LOCK_FILE = ".running.lock"


@contextlib.contextmanager
def working_alone(output_dir: Path) -> Iterator[None]:
    """While entered, no other run can begin in ``output_dir``; of several processes of a run, the first sees to that.

    The operating system holds the lock, so that a killed run leaves none behind. Without such locks nothing is held.

    Raises:
        UserError: another run is at work there, or the folder can't be written.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    lock = FileLock(output_dir / _LOCK_FILE)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another run is at work in {output_dir}: wait for it, end it by a file named stop there, or choose "
            "another --output_dir"
        ) from None
    except NotImplementedError:
        yield
        return
    except OSError as problem:
        raise UserError(f"can't write to {output_dir}: {problem.strerror or problem}") from problem
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            (output_dir / _LOCK_FILE).unlink(missing_ok=True)
        lock.release()


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
    if first_step > 0:
        return _go_back(output_dir, first_step)
    if not has_history(output_dir):
        return []
    traces = [output_dir / name for name in (METRICS_FILE, SAMPLES_FOLDER, HISTORY_FOLDER)]
    aside = _set_aside(output_dir, [path for path in traces if path.exists()])
    return [f"an earlier run ended before its first checkpoint; the adapters that it kept are in {aside} now"]


def _go_back(output_dir: Path, first_step: int) -> list[str]:
    """Checkpoints of later steps are of another course of the run: ``latest`` must not go on from them one day."""
    later = [path for path in existing_checkpoints(output_dir) if step_of(path) > first_step]
    if not later:
        return []
    later += [path for step, path in history_files(output_dir).items() if step > first_step]
    later += [path for step, paths in sample_files(output_dir).items() if step > first_step for path in paths]
    aside = _set_aside(output_dir, later)
    if (output_dir / METRICS_FILE).exists():  # the lines of the steps before are those of the new course too
        shutil.copyfile(output_dir / METRICS_FILE, aside / METRICS_FILE)
    return [f"going back to step {first_step}: what an earlier run saved after it is in {aside} now"]


def _set_aside(output_dir: Path, paths: Sequence[Path]) -> Path:
    """Give traces of an earlier run a folder of their own: its steps are not those of the new one."""
    number = 1
    while (aside := output_dir / f"earlier-{number}").exists():
        number += 1
    for path in paths:
        target = aside / path.relative_to(output_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return aside
