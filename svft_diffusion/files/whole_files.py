"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from svft_diffusion.errors import UserError


@contextlib.contextmanager
def replace_when_whole(file: Path) -> Iterator[Path]:
    """The path of a temporary file that takes the place of ``file`` when the block ends without an error.

    Raises:
        UserError: the file can't be written; an older one is as it was.
    """
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, file)
    except OSError as problem:
        raise UserError(f"can't write {file}: {problem.strerror or problem}") from problem
    finally:
        with contextlib.suppress(OSError):  # gone already when all went well
            unfinished.unlink()


def check_output_file(file: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output that is no safetensors file, is one of the inputs, or would replace a file unasked.

    Raises:
        UserError: as said, or its folder can't be written to.
    """
    if file.is_dir():
        raise UserError(f"the output {file} is a folder; name a file")
    if file.suffix != ".safetensors":
        raise UserError(f"the output {file} must end in .safetensors")
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
