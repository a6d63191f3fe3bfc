"""What the library knows of one file, read once for as long as the file stays as it is."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from svft_diffusion.errors import UserError
from svft_diffusion.files import AdapterHeader
from svft_diffusion.files.adapter_file import METADATA_KEY, contents_from_bytes
from svft_diffusion.files.container import LARGEST_HEADER, refuse_other_files

_GONE = "it is no longer there"
_LENGTH_BYTES = 8  # before the header of a safetensors file
MOST_BYTES_THAT_TELL = _LENGTH_BYTES + LARGEST_HEADER
"""Of a file, so many at its beginning say whether it is one of ours."""


class FileStamp(NamedTuple):
    """A file whose stamp is the same was not written in between."""

    size: int
    modified: int  # nanoseconds since 1970


@dataclass(frozen=True)
class Reading:
    """What a file is: an adapter with a header, damaged for a reason, or neither, which is something else."""

    stamp: FileStamp
    header: AdapterHeader | None = None
    layers: tuple[str, ...] = ()
    sha256: str = ""
    damage: str | None = None


def read_candidate(file: Path, root: Path, label: str) -> Reading:
    """Read a file below ``root`` that may be an adapter; ``label`` is what the reason calls it. Raises nothing."""
    stamp = FileStamp(0, 0)
    try:
        # A link may be there, but not lead out; what it leads to is read under a path without links.
        real = file.resolve(strict=True)
        if not real.is_relative_to(root.resolve()):
            return Reading(stamp, damage=f"{label} links to a file outside the library")
        with real.open("rb") as opened:
            stamp = stamp_of(os.fstat(opened.fileno()))
            content = _content_of_adapter(opened, label)
        if content is None:
            return Reading(stamp)
        header, layers = contents_from_bytes(content, label)
        return Reading(stamp, header, tuple(layers), hashlib.sha256(content).hexdigest())
    except UserError as problem:
        return Reading(stamp, damage=str(problem))
    except FileNotFoundError:
        return Reading(stamp, damage=f"{label}: {_GONE}")
    except (OSError, RuntimeError) as problem:  # RuntimeError: links in a circle
        return Reading(
            stamp, damage=f"{label} can't be read: {getattr(problem, 'strerror', None) or 'links in a circle'}"
        )


def stamp_of(status: os.stat_result) -> FileStamp:
    """The stamp of a file."""
    return FileStamp(status.st_size, status.st_mtime_ns)


def _content_of_adapter(opened: BinaryIO, label: str) -> bytes | None:
    """All bytes of a file of ours; None for weights of other kinds, of which no more than the header is read."""
    start = opened.read(MOST_BYTES_THAT_TELL)
    refuse_other_files(start[:512], label)
    if names_our_format(start):
        return start + opened.read()
    if len(start) < _LENGTH_BYTES + min(_header_length(start), LARGEST_HEADER):
        raise UserError(f"{label} is cut short")
    return None


def names_our_format(start: bytes) -> bool:
    """Whether the header in the first bytes of a safetensors file has the entry that only our files have."""
    return f'"{METADATA_KEY}"'.encode() in start[_LENGTH_BYTES : _LENGTH_BYTES + _header_length(start)]


def _header_length(start: bytes) -> int:
    return int.from_bytes(start[:_LENGTH_BYTES], "little")
