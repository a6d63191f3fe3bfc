"""Folders for runs that were given none: ``001``, ``002``, ..."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from svft_diffusion.errors import UserError


def new_numbered_folder(parent: Path) -> Path:
    """The folder in ``parent`` whose number follows the highest there: ``001``, ``002``, ..."""
    taken = [int(folder.name) for folder in parent.glob("[0-9]*") if folder.name.isdecimal()]
    return parent / f"{max(taken, default=0) + 1:03d}"


@contextmanager
def folder_of_run(given: Path | None, parent: Path) -> Iterator[Path]:
    """The folder of a run: ``given``, or the next number below ``parent``.

    The numbered one is made at once, so that of two runs that start together each gets its own. If nothing has been
    written into it at the end, no trace of it stays.

    Raises:
        UserError: it can't be made.
    """
    if given is not None:
        yield given
        return
    there = {folder for folder in (parent, *parent.parents) if folder.exists()}
    folder = _reserved(parent)
    try:
        yield folder
    finally:
        for empty in (folder, parent, *parent.parents):
            if empty not in there:
                with suppress(OSError):  # it holds something
                    empty.rmdir()


def _reserved(parent: Path) -> Path:
    while True:
        folder = new_numbered_folder(parent)
        try:
            folder.mkdir(parents=True)
        except FileExistsError as problem:
            if folder.parent.is_dir():
                continue  # another run was faster
            raise UserError(f"can't write to {folder}: a folder on the way is a file") from problem
        except OSError as problem:
            raise UserError(f"can't write to {folder}: {problem.strerror or problem}") from problem
        return folder
