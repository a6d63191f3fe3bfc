"""Files that visitors upload: what they hold decides, and nothing of them is trusted."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from svft_diffusion.app.shelf.library_reading import MOST_BYTES_THAT_TELL, names_our_format
from svft_diffusion.errors import UserError
from svft_diffusion.files import adapter_from_bytes
from svft_diffusion.files.carrier import PNG_SIGNATURE
from svft_diffusion.files.container import refuse_other_files
from svft_diffusion.files.safe_names import safe_file_stem
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.inspection.picture import facts_of_picture
from svft_diffusion.terminal import printable

MOST_UPLOAD_BYTES = 64 * 2**20
MOST_PIXELS = 64_000_000
_LONGEST_SHOWN_NAME = 80


def shown_name(file_name: str) -> str:
    """A visitor's name of a file as messages show it: without folders, on one line, not too long."""
    return printable(re.split(r"[\\/]", file_name)[-1], _LONGEST_SHOWN_NAME) or "the file"


def read_upload(file: Path, file_name: str, most_bytes: int) -> bytes:
    """The content of an uploaded file.

    Raises:
        UserError: it is larger than ``most_bytes``, or gone.
    """
    return _read(file, file_name, most_bytes, -1)


def start_of_upload(file: Path, file_name: str, most_bytes: int) -> bytes:
    """As much of an uploaded file as tells what it is. Raises as `read_upload`."""
    return _read(file, file_name, most_bytes, MOST_BYTES_THAT_TELL)


def _read(file: Path, file_name: str, most_bytes: int, bytes_: int) -> bytes:
    try:
        with file.open("rb") as opened:
            if os.fstat(opened.fileno()).st_size > most_bytes:
                raise UserError(
                    f"{shown_name(file_name)} is larger than the {most_bytes / 2**20:.3g} MB that the app takes"
                )
            return opened.read(bytes_)
    except OSError as problem:
        raise UserError(f"{shown_name(file_name)} did not arrive; upload it again") from problem


def adapters_in_upload(content: bytes, file_name: str, most_pixels: int) -> list[tuple[str, bytes]]:
    """The adapters that an uploaded file is or carries, each whole and sound: a name fit for a file, and the content.

    Raises:
        UserError: it is none and carries none, is damaged, or is a picture of more than ``most_pixels``.
    """
    label = shown_name(file_name)
    if not content.startswith(PNG_SIGNATURE):
        adapter_from_bytes(content, label)
        return [(safe_file_stem(file_name), content)]
    check_pixels(content, label, most_pixels)
    picture = facts_of_picture(content, Path(label))
    if not picture.adapters:
        raise UserError(f"{label} is a picture that carries no adapter")
    return [(carried.name, carried.content) for carried in picture.adapters]


def check_pixels(png: bytes, label: str, most_pixels: int) -> None:
    """Refuse a PNG picture by the size that it claims, before anything of it is decoded.

    Raises:
        UserError: it has more than ``most_pixels``, or none.
    """
    width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
    if not 0 < width * height <= most_pixels:
        raise UserError(
            f"{label} claims {width} x {height} pixels; the app takes up to {most_pixels / 1e6:.3g} million"
        )


def is_foreign(start: bytes) -> bool:
    """Whether a `start_of_upload` is that of a safetensors file that `svft-diffusion import` may know and the library
    does not."""
    if start.startswith(PNG_SIGNATURE):
        return False
    try:
        refuse_other_files(start[:512], "the file")
    except UserError:
        return False
    return not names_our_format(start)


def new_file(folder: Path, stem: str, taken: Iterable[str] = ()) -> Path:
    """An empty file of its own: ``STEM.safetensors``, with a number where there is such a name already.

    Args:
        taken: more stems that it must not have.

    Raises:
        UserError: it can't be written.
    """
    others = {name.casefold() for name in taken}
    name, number = stem, 2
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others |= {file.stem.casefold() for file in folder.iterdir()}
        while True:
            file = folder / f"{name}.safetensors"
            if name.casefold() not in others:
                with contextlib.suppress(FileExistsError):
                    file.open("xb").close()  # from here on nobody else takes the name
                    return file
            name, number = f"{stem}-{number}", number + 1
    except OSError as problem:
        raise UserError(f"the app can't write its folder: {problem.strerror or problem}") from problem


@contextlib.contextmanager
def removed_on_error(file: Path) -> Iterator[None]:
    """While entered, an error removes a `new_file`, and names no path on the server."""
    try:
        with called(file.name, file):
            yield
    except BaseException:
        with contextlib.suppress(OSError):
            file.unlink()
        raise


def write_new(folder: Path, stem: str, content: bytes, taken: Iterable[str]) -> Path:
    """A `new_file` with content, whole or not at all. Raises as `new_file`."""
    file = new_file(folder, stem, taken)
    with removed_on_error(file), replace_when_whole(file) as unfinished:
        unfinished.write_bytes(content)
    return file


@contextlib.contextmanager
def called(label: str, file: Path) -> Iterator[None]:
    """While entered, a user's error calls ``file`` by ``label``: where it lies on the server concerns nobody else."""
    try:
        yield
    except UserError as problem:
        raise UserError(without_path(str(problem), label, file)) from problem.__cause__


def without_path(text: str, label: str, file: Path) -> str:
    """``text`` with ``label`` in place of the path of ``file``, however it is written."""
    paths = dict.fromkeys((file, file.absolute(), file.resolve()))
    for path in sorted(paths, key=lambda one: -len(str(one))):
        for spelled in (repr(str(path))[1:-1], str(path), path.as_posix()):
            text = text.replace(spelled, label)
        if path.is_absolute():
            text = text.replace(str(path.parent), "the folder")
    return text
