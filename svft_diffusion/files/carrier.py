"""Adapters inside PNG pictures: the picture brings along what it was made with.

Each adapter is one chunk ``svFt``, whose data are the bytes of the adapter's file, nothing more. Its four letters say
how other programs may treat it (PNG specification, third edition, section 5.4 "Chunk naming conventions"):

* ``s``, lower case, ancillary: who does not know the chunk shows the picture without it;
* ``v``, lower case, private: neither in the specification nor registered;
* ``F``, upper case: reserved, as the specification wants it;
* ``t``, lower case, safe to copy (section 14.2): it does not depend on the pixels, so that an editor which does not
  know the chunk may keep it when it crops or retouches the picture.

Which adapter has which name and weight stands in the picture's settings, the text chunk ``svft_diffusion``, which lists
them by the SHA-256 of their files.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from svft_diffusion.errors import UserError
from svft_diffusion.files.container import parse_json, read_bytes
from svft_diffusion.terminal import printable

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ADAPTER_CHUNK = b"svFt"
SETTINGS_KEYWORD = "svft_diffusion"  # of the text chunk that holds a picture's settings as JSON

_START = struct.Struct(">I4s")  # of a chunk: length of its data, type
_CHECKSUM = struct.Struct(">I")  # its end: CRC-32 of type and data
_LARGEST_LENGTH = 2**31 - 1
# A picture of 200 million pixels in the small chunks of old encoders; parsing as many takes a fraction of a second.
_MOST_CHUNKS = 100_000
_LARGEST_SETTINGS = 2**20
_LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class CarriedAdapter:
    """One adapter that a picture carries."""

    content: bytes  # of the adapter's file
    name: str | None  # as the picture's settings call it, any text; None where they don't
    weight: float | None  # at which it acted

    @property
    def sha256(self) -> str:
        """Digest of the adapter's file."""
        return hashlib.sha256(self.content).hexdigest()


def adapter_in_png(data: bytes, label: str) -> bytes | None:
    """The file of the one adapter that a picture carries, or None if it carries none.

    Args:
        data: the whole PNG file. Nothing in it is decompressed.
        label: what messages call it.

    Raises:
        UserError: it is damaged, or carries several adapters.
    """
    found = adapters_in_png(data, label)
    if len(found) > 1:
        names = printable(", ".join(adapter.name or adapter.sha256[:8] for adapter in found), longest=200)
        raise UserError(
            f"{label} carries {len(found)} adapters ({names}); take them out and load the one you want: "
            f"svft-diffusion inspect {label} --extract FOLDER"
        )
    return found[0].content if found else None


def adapters_in_png(data: bytes, label: str) -> list[CarriedAdapter]:
    """Every adapter that a picture carries, in the order of its chunks.

    Raises:
        UserError: no PNG picture, or damaged anywhere: the checksums of all its chunks are compared.
    """
    contents, settings = _contents(data, label)
    adapters = settings.get("adapters")
    listed = _by_sha256(adapters) if isinstance(adapters, list) else {}
    return [_described(content, listed) for content in contents]


def settings_in_png(data: bytes, label: str) -> dict[str, Any]:
    """The settings that a picture was made with; empty where it has none. Its pixels are not decoded.

    Raises:
        UserError: as `adapters_in_png`.
    """
    return _contents(data, label)[1]


def file_of_adapter(file: Path) -> bytes:
    """The bytes of an adapter's file, from the file itself or from a picture that carries it.

    Raises:
        UserError: it can't be read, or is a picture without an adapter, with several, or damaged.
    """
    return content_of_adapter(read_bytes(file), str(file))


def content_of_adapter(data: bytes, label: str) -> bytes:
    """`file_of_adapter` for what was read already; ``label`` is what messages call it."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    content = adapter_in_png(data, label)
    if content is None:
        raise UserError(f"{label} is a picture that carries no adapter")
    return content


def _chunks(data: bytes, label: str) -> Iterator[tuple[bytes, memoryview]]:
    """Type and data of every chunk, once its checksum was compared."""
    if not data.startswith(PNG_SIGNATURE):
        raise UserError(f"{label} is no PNG picture")
    whole = memoryview(data)
    position = len(PNG_SIGNATURE)
    for number in range(_MOST_CHUNKS):
        if position + _START.size > len(data):
            raise UserError(f"the picture {label} is cut short")
        length, kind = _START.unpack_from(data, position)
        end = position + _START.size + length
        if length > _LARGEST_LENGTH or end + _CHECKSUM.size > len(data):
            raise UserError(f"the picture {label} is damaged or cut short")
        if zlib.crc32(whole[position + 4 : end]) != _CHECKSUM.unpack_from(data, end)[0]:
            raise UserError(f"the picture {label} is damaged: a checksum is wrong")
        if (number == 0) != (kind == b"IHDR"):
            raise UserError(f"the picture {label} is damaged: its header is not where it belongs")
        yield kind, whole[position + _START.size : end]
        position = end + _CHECKSUM.size
        if kind == b"IEND":
            if length or position != len(data):
                raise UserError(f"the picture {label} is damaged: something follows its end")
            return
    raise UserError(f"the picture {label} has more than {_MOST_CHUNKS} chunks, as no picture needs")


def _contents(data: bytes, label: str) -> tuple[list[bytes], dict[str, Any]]:
    """The files of all adapters in a picture, and its settings; none where they are not what we write."""
    adapters: list[bytes] = []
    settings: dict[str, Any] = {}
    for kind, body in _chunks(data, label):
        if kind == ADAPTER_CHUNK:
            adapters.append(bytes(body))
        elif kind == b"tEXt" and len(body) <= _LARGEST_SETTINGS:
            keyword, _, text = bytes(body).partition(b"\0")
            if keyword == SETTINGS_KEYWORD.encode():
                with contextlib.suppress(ValueError, RecursionError):
                    settings = parse_json(text.decode("latin-1"))
    return adapters, settings


def _by_sha256(adapters: list[Any]) -> dict[str, dict[str, Any]]:
    """The adapters that a picture's settings list; what is no such entry is passed over."""
    entries = [entry for entry in adapters if isinstance(entry, dict) and isinstance(entry.get("sha256"), str)]
    return {entry["sha256"]: entry for entry in entries}


def _described(content: bytes, listed: dict[str, dict[str, Any]]) -> CarriedAdapter:
    entry = listed.get(hashlib.sha256(content).hexdigest(), {})
    name, weight = entry.get("name"), entry.get("weight")
    return CarriedAdapter(
        content, name if isinstance(name, str) else None, float(weight) if _is_weight(weight) else None
    )


def _is_weight(value: object) -> TypeGuard[float]:
    # Compared, not converted: JSON holds whole numbers that no float can be.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_WEIGHT
