"""The small picture in an adapter file, by which galleries show it."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from PIL import Image

_SIDE = 256  # pixels, at most
_LARGEST = 16 * 1024  # bytes; an adapter of a small model takes little more itself
_QUALITIES = (85, 75, 65, 55, 45, 35, 25, 15, 5)


def jpeg_thumbnail(file: Path) -> bytes:
    """A picture as JPEG of at most 256 x 256 pixels, in the best quality that takes at most 16 kB.

    It holds pixels and nothing else of the file; equal pixels give equal bytes.
    """
    with Image.open(file) as opened:
        small = opened.convert("RGB")
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    pixels = Image.frombytes("RGB", small.size, small.tobytes())  # without the texts of the file
    for quality in _QUALITIES:
        encoded = BytesIO()
        pixels.save(encoded, format="JPEG", quality=quality, optimize=True)
        if encoded.tell() <= _LARGEST:
            break
    return encoded.getvalue()
