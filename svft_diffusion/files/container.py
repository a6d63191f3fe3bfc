"""The safetensors container: a strict reader of its header, and a writer that gives the same bytes every time.

A file is the length of the header (uint64, little endian), the header (JSON: tensor name -> dtype, shape, place; and
``__metadata__`` with text entries), and the tensors' bytes without gaps. See
https://github.com/huggingface/safetensors#format. The safetensors library reads the tensors; what it lets pass and an
adapter file must not hold is refused here first: names that stand twice, headers and tables larger than any adapter
needs, types of parts of a byte, bytes that belong to no tensor. The library writes the entries of ``__metadata__`` in
an order that changes from run to run, so the header is written here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from svft_diffusion.errors import UserError

METADATA = "__metadata__"
LARGEST_HEADER = 2 * 2**20
"""Bytes of an adapter's header: the largest models have a few thousand layers, 100 to 200 bytes each."""
LARGEST_NUMBER_OF_TENSORS = 10_000

_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8  # of the tensors' bytes in the file, as the format asks for
# JSON of many small lists and objects takes 50 times its own size in memory; a header of ours has 4 marks a tensor.
_LARGEST_NUMBER_OF_MARKS = 400_000
_MARKS = b"[]{},:"
# In the order in which the safetensors library writes them: large elements first, so that all are aligned.
_DTYPES = {torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
# Bytes of an element. Also of types that no adapter has: a LoRA, or a file of a later format, is to be called that.
_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1, "C64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_LONGEST_NAME = 512
_DEEPEST = 32  # lists and objects in one another
_LARGEST_COUNT = 2**48  # what no file has, and products of which stay exact


class Entry(NamedTuple):
    """One tensor of a file."""

    dtype: str  # as the format spells it, such as F32
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    end: int


class Container(NamedTuple):
    """A file whose header is sound."""

    data: bytes  # the whole file
    metadata: dict[str, str]
    entries: dict[str, Entry]

    def bytes_of(self, name: str) -> memoryview:
        """The bytes of a tensor."""
        entry = self.entries[name]
        return memoryview(self.data)[entry.start : entry.end]


def read_container(data: bytes, label: str) -> Container:
    """The contents of a safetensors file, given its bytes; ``label`` is what messages call it.

    Raises:
        UserError: it is something else, damaged, or not what a file of ours can be.
    """
    refuse_other_files(data[:512], label)
    start = _check_header_length(data, len(data), label, LARGEST_HEADER)
    try:
        header = parse_json(data[_LENGTH.size : start].decode("utf-8"))
        metadata = _metadata_of(header.pop(METADATA, {}))
        entries, end = _entries_of(header, start)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise UserError(f"{label} has a damaged header: {one_line(problem)}") from problem
    if end != len(data):
        state = "cut short" if end > len(data) else "longer than its header says"
        raise UserError(f"{label} is {state}: it should have {end} bytes, it has {len(data)}")
    return Container(data, metadata, entries)


def refuse_other_files(start: bytes, label: str) -> None:
    """Say what a file is that is no safetensors file, going by its first bytes.

    Raises:
        UserError: it is none; the message names what it seems to be.
    """
    if len(start) >= 9 and start[8:9] == b"{" and _LENGTH.unpack_from(start)[0] < 2**40:
        return
    kind = "no safetensors file"
    text = start.lstrip().lower()
    if not start:
        kind = "empty; copy or download it again"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        kind = "a web page, not an adapter: the download led to a page for people; download the file itself"
    elif text.startswith(b"version https://git-lfs"):
        kind = "a Git LFS pointer, not the file itself: run `git lfs pull`"
    elif start.startswith((b"\x80", b"PK\x03\x04", b"\x1f\x8b", b"(", b"BZh")):
        kind = "a pickled or packed file (.bin, .pt, .ckpt, .zip); such files are never opened, use .safetensors"
    elif start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF")):
        kind = "a picture that carries no adapter"
    elif len(start) >= 9 and start[8:9] == b"{":
        kind = f"no safetensors file: it claims a header of {_LENGTH.unpack_from(start)[0]} bytes"
    raise UserError(f"{label} is {kind}")


def check_container(file: Path, largest_header: int) -> None:
    """Refuse what can't be a safetensors file before a parser sees it; for files that are too large to read whole.

    Raises:
        UserError: as `read_container`, as far as the first bytes tell; or the file can't be read.
    """
    with _opened(file) as opened:
        start = opened.read(512)
        size = os.fstat(opened.fileno()).st_size
    refuse_other_files(start, str(file))
    _check_header_length(start, size, str(file), largest_header)


def read_bytes(file: str | Path) -> bytes:
    """All bytes of a file.

    Raises:
        UserError: it is a folder, a device or a pipe, or can't be read.
    """
    with _opened(Path(file)) as opened:
        return opened.read()


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        if file.is_dir():
            inside = sorted(found.name for found in file.glob("*.safetensors"))
            hint = f"name the file in it, such as {inside[0]}" if inside else "no adapter is in it"
            raise UserError(f"{file} is a folder; {hint}")
        if file.exists() and not file.is_file():  # reading a pipe may never end
            raise UserError(f"{file} is no regular file")
        with file.open("rb") as opened:
            yield opened
    except (OSError, ValueError) as problem:  # ValueError: a null character in the name
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"can't read {str(file)[:200]!r}: {reason}") from problem


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object in which no name stands twice, of numbers that are numbers, and of a size that we write.

    Raises:
        ValueError: it is something else.
        RecursionError: it is too deep.
    """
    if sum(text.count(chr(mark)) for mark in _MARKS) > _LARGEST_NUMBER_OF_MARKS:
        raise ValueError("it has more entries than any adapter needs")
    parsed = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite)
    if not isinstance(parsed, dict):
        raise ValueError("it is no JSON object")
    level: list[Any] = [parsed]
    for _ in range(_DEEPEST):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [item for values in inner for item in values if isinstance(item, dict | list)]
    if level:
        raise ValueError("it is deeper than any adapter needs")
    return parsed


def container_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of ``tensors`` (CPU), in the order of `names_in_file`. Equal input gives equal bytes."""
    contents: dict[str, object] = {METADATA: dict(metadata)}
    parts = []
    offset = 0
    for name in names_in_file(tensors):
        part = tensor_bytes(tensors[name])
        end = offset + len(part)
        contents[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        parts.append(part)
        offset = end
    header = json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return b"".join([_LENGTH.pack(len(header)), header, *parts])


def names_in_file(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order in which the tensors lie in a file: by dtype, then by name."""
    dtypes = list(_DTYPES)
    return sorted(tensors, key=lambda name: (dtypes.index(tensors[name].dtype), name))


def content_digest(parts: Iterable[tuple[str, str, Sequence[int], memoryview]], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the name, dtype, shape and bytes of each tensor in ``parts``, in that order, and over ``metadata``.

    Each is preceded by its length, so that no two contents give the same input. How the tensors lie in the file, and
    in which order its header lists things, does not count.
    """
    digest = hashlib.sha256()
    for name, dtype, shape, content in parts:
        described = json.dumps([name, dtype, *shape]).encode()
        digest.update(_LENGTH.pack(len(described)) + described + _LENGTH.pack(len(content)))
        digest.update(content)
    text = json.dumps(dict(metadata), sort_keys=True).encode()
    digest.update(_LENGTH.pack(len(text)) + text)
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, little endian, as the format has them; copied only where need be."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    if plain.dtype == torch.bfloat16:  # which numpy does not have
        plain = plain.view(torch.int16)
    array = plain.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).view(np.uint8).data


def dtype_name(tensor: Tensor) -> str:
    """What the format calls a tensor's dtype."""
    return _DTYPES.get(tensor.dtype, str(tensor.dtype))


def one_line(problem: BaseException) -> str:
    """The first line of an error's message, cut to a length that people read."""
    text = str(problem) or type(problem).__name__
    return text.splitlines()[0][:200]


def _check_header_length(data: bytes, size: int, label: str, largest: int) -> int:
    """Where the header of a file of ``size`` bytes ends."""
    (length,) = _LENGTH.unpack_from(data)
    if length > largest:
        raise UserError(f"{label} has a header of {length} bytes, more than any adapter needs")
    end: int = _LENGTH.size + length
    if end > size:
        raise UserError(f"{label} is cut short: its header alone needs {end} bytes, it has {size}")
    return end


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {twice[:100]!r} stands twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _metadata_of(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA} is not made of text")
    return metadata


def _entries_of(header: Mapping[str, Any], start: int) -> tuple[dict[str, Entry], int]:
    """The tensors, and where the last one ends."""
    if len(header) > LARGEST_NUMBER_OF_TENSORS:
        raise ValueError(f"{len(header)} tensors are more than any adapter needs")
    entries = {name: _entry_of(name, described, start) for name, described in header.items()}
    expected = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != expected:
            raise ValueError("the tensors' bytes overlap, or leave a gap")
        expected = entry.end
    return entries, expected


def _entry_of(name: str, described: Any, start: int) -> Entry:
    if len(name) > _LONGEST_NAME or not name.isprintable():  # messages quote names
        raise ValueError(f"{name[:100]!r} is no name of a tensor")
    if not isinstance(described, dict) or described.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of tensor {name[:100]!r} is not one of the format")
    dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ValueError(f"tensor {name[:100]!r} is of a type that no adapter has")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(side) for side in shape):
        raise ValueError(f"tensor {name[:100]!r} has no shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise ValueError(f"tensor {name[:100]!r} has no place in the file")
    begin, end = offsets
    if end - begin != math.prod(shape) * _SIZES[dtype]:
        raise ValueError(f"tensor {name[:100]!r} has another number of bytes than its shape needs")
    return Entry(dtype, tuple(shape), start + begin, start + end)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_COUNT
