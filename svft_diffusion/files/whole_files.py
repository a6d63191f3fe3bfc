"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from svft_diffusion.errors import UserError

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp")


@contextlib.contextmanager
def replace_when_whole(file: Path, *, flush: bool = True) -> Iterator[Path]:
    """The path of a temporary file that takes the place of ``file`` when the block ends without an error.

    Args:
        flush: wait until the disk holds it, so that a power cut leaves the older or the new file; without, only the
            end of the program can't cut it in two.

    Raises:
        UserError: the file can't be written; an older one is as it was.
    """
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        if flush:
            flush_to_disk(unfinished)
        os.replace(unfinished, file)
        if flush:
            flush_to_disk(file.parent)
    except OSError as problem:
        raise UserError(f"can't write {file}: {problem.strerror or problem}") from problem
    finally:
        with contextlib.suppress(OSError):  # gone already when all went well
            unfinished.unlink()


def is_unfinished(name: str, of: re.Pattern[str]) -> bool:
    """Whether a file is a temporary one of `replace_when_whole` for a file whose name matches ``of``."""
    unfinished = _UNFINISHED.fullmatch(name)
    return unfinished is not None and of.fullmatch(unfinished[1]) is not None


def flush_to_disk(path: Path) -> None:
    """Wait until a power cut can't take the file, or the names in the folder, away again."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle of a folder to flush
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> list[str]:
    """Remove the temporary files that killed programs left in ``folder``; their names."""
    names = [path.name for path in folder.iterdir() if _UNFINISHED.fullmatch(path.name)] if folder.is_dir() else []
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    return names


def allow_as_usual(files: Iterable[Path], folder: Path) -> None:
    """Give files the permissions that new ones get in ``folder``: safetensors makes its own for their owner alone."""
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        probe.touch()
        mode = probe.stat().st_mode
    finally:
        probe.unlink(missing_ok=True)
    for file in files:
        file.chmod(mode)


def check_output_file(file: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output that is no safetensors file, is one of the inputs, or would replace a file unasked.

    Raises:
        UserError: as said, or its folder can't be written to.
    """
    if file.suffix != ".safetensors" and not file.is_dir():
        raise UserError(f"the output {file} must end in .safetensors")
    check_new_file(file, overwrite=overwrite, inputs=inputs)


def check_new_file(file: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """`check_output_file` for files of any ending.

    Raises:
        UserError: it is a folder, one of the inputs, there already, or its folder can't be written to.
    """
    if file.is_dir():
        raise UserError(f"the output {file} is a folder; name a file")
    if any(file.resolve() == given.resolve() for given in inputs):
        raise UserError(f"{file} is one of the files to read; write to another")
    if file.exists() and not overwrite:
        raise UserError(f"{file} is there already; choose another name, or replace it with --overwrite")
    check_writable(file.parent)


def check_writable(folder: Path) -> None:
    """Whether ``folder`` can be created or written into, found out without leaving a trace.

    Raises:
        UserError: it can't.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"can't write to {folder}: {existing} is a file")
    try:
        # Permission bits say nothing of read-only and special file systems, and nothing at all to root.
        tempfile.TemporaryDirectory(prefix=".writable-", dir=existing).cleanup()
    except OSError as problem:
        raise UserError(f"can't write to {folder}: {problem.strerror or problem}") from problem
