"""Looks for private words in files, in every form in which the formats of this package could hide them."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from svft_diffusion.files.carrier import PNG_SIGNATURE

_BASE64 = re.compile(rb"[A-Za-z0-9+/]{16,}={0,2}")
# What no file meant for others has any use for, whoever made it. Looked for in text alone: bytes hold anything.
_PATTERNS = {
    "an absolute path": re.compile(r"(?<![\w./:])/(home|Users|root|tmp|var|private|mnt|opt|work)/|\b[A-Za-z]:\\\w"),
    "an e-mail address": re.compile(r"\b[\w.+-]+@[\w-]+\.[a-z]{2,}\b"),
    "an access token": re.compile(r"\bhf_\w{8,}"),
}


def leaks(files: Iterable[Path], markers: Sequence[str]) -> list[str]:
    """What the files tell of their maker, one line each: a marker in their content or name, a path, an address."""
    found: dict[str, None] = {}
    for file in files:
        for marker in _markers_in(file.name.encode(), markers):
            found[f"{file.name}: {marker} in its name"] = None
        for view in views(file.read_bytes()):
            for leak in (*_markers_in(view, markers), *_patterns_in(view)):
                found[f"{file.name}: {leak}"] = None
    return list(found)


def views(content: bytes) -> Iterator[bytes]:
    """The content itself, and everything that is packed inside of it."""
    yield content
    inner: list[bytes] = []
    if content.startswith(PNG_SIGNATURE):
        inner += _png_chunks(content)
    elif header := _safetensors_header(content):
        inner.append(header)
    inner += _texts_of_json(content)
    inner += (_decoded(run) for run in _BASE64.findall(content))
    for part in inner:
        if part and part != content:
            yield from views(part)


def _markers_in(view: bytes, markers: Sequence[str]) -> Iterator[str]:
    small = view.lower()
    for marker in markers:
        if any(marker.lower().encode(encoding) in small for encoding in ("utf-8", "utf-16-le", "utf-16-be")):
            yield marker


def _patterns_in(view: bytes) -> Iterator[str]:
    try:
        text = view.decode("utf-8")
    except UnicodeDecodeError:
        return
    for kind, pattern in _PATTERNS.items():
        if match := pattern.search(text):
            yield f"{kind} ({text[match.start() : match.start() + 40]!r})"


def _png_chunks(content: bytes) -> Iterator[bytes]:
    """The content of each chunk but the pixels; of texts what they say, inflated."""
    position = len(PNG_SIGNATURE)
    while position < len(content):
        (length,) = struct.unpack_from(">I", content, position)
        kind, data = content[position + 4 : position + 8], content[position + 8 : position + 8 + length]
        position += length + 12
        if kind == b"IDAT":
            continue
        yield data
        yield from data.split(b"\0")  # keyword, flags, text
        for start in range(min(len(data), 120)):  # where zlib begins depends on the keyword
            if data[start : start + 1] == b"\x78":
                try:
                    yield zlib.decompress(data[start:])
                except zlib.error:
                    continue


def _safetensors_header(content: bytes) -> bytes:
    if len(content) < 10 or content[8:9] != b"{":
        return b""
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _texts_of_json(content: bytes) -> Iterator[bytes]:
    """All texts in JSON or lines of JSON, without their escapes."""
    for candidate in (content, *content.split(b"\n")):
        if candidate[:1] in (b"{", b"["):
            try:
                yield from (text.encode("utf-8", "replace") for text in _texts(json.loads(candidate)))
            except (ValueError, RecursionError):
                continue


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _decoded(run: bytes) -> bytes:
    try:
        return base64.b64decode(run[: len(run) // 4 * 4])
    except ValueError:
        return b""
