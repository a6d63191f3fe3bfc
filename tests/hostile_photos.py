"""Damaged and hostile pictures: small whole ones in every format, mutants of them by number, and known bombs."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


@cache
def whole_pictures() -> dict[str, bytes]:
    """File names and contents of pictures that can be used, of every format, mode and compression."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 20, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    rgb = rgba.convert("RGB")
    sixteen = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    turned[0x010E] = "a description"
    text = PngInfo()
    text.add_text("comment", "hello " * 20, zip=True)
    files = {
        "rgb.png": _saved(rgb, "PNG", pnginfo=text),
        "alpha.png": _saved(rgba, "PNG"),
        "palette.png": _saved(rgb.convert("P"), "PNG", transparency=3),
        "sixteen.png": _saved(sixteen, "PNG"),
        "bit.png": _saved(rgb.convert("1"), "PNG"),
        "turned.png": _saved(rgb, "PNG", exif=turned),
        "animated.png": _saved(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)]),
        "base.jpg": _saved(rgb, "JPEG", exif=turned),
        "progressive.jpg": _saved(rgb, "JPEG", progressive=True, quality=80),
        "grey.jpg": _saved(rgb.convert("L"), "JPEG"),
        "cmyk.jpg": _saved(rgb.convert("CMYK"), "JPEG"),
        "phone.jpg": _saved(rgb, "MPO", save_all=True, append_images=[rgb]),
        "lossy.webp": _saved(rgb, "WEBP", exif=turned),
        "lossless.webp": _saved(rgba, "WEBP", lossless=True),
        "animated.webp": _saved(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)]),
        "rgb.bmp": _saved(rgb, "BMP"),
        "palette.bmp": _saved(rgb.convert("P"), "BMP"),
        "raw.tif": _saved(rgb, "TIFF"),
        "lzw.tif": _saved(rgb, "TIFF", compression="tiff_lzw"),
        "deflate.tiff": _saved(sixteen, "TIFF", compression="tiff_adobe_deflate"),
        "float.tif": _saved(Image.fromarray(noise[..., 1].astype(np.float32)), "TIFF"),
        "pages.tif": _saved(rgb, "TIFF", save_all=True, append_images=[rgb]),
    }
    return files


def mutant(number: int) -> tuple[str, bytes]:
    """The n-th damaged picture: its file name and content; equal for equal numbers."""
    chance = random.Random(number)
    name, content = chance.choice(list(whole_pictures().items()))
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        chance.choice(_MUTATIONS)(data, chance)
        if not data:
            break
    return f"{number:05d}-{name}", bytes(data)


@cache
def bombs() -> dict[str, bytes]:
    """Small files that claim to be large, or have a program allocate much; all must be refused."""
    exploding_text = zlib.compress(bytes(100_000_000), 9)
    return {
        "wide.png": _png(50_000, 50_000, zlib.compress(b"")),
        "claims.png": _png(2**31 - 1, 2**31 - 1, b""),
        "nothing.png": _png(0, 0, b""),
        "whole.png": _png(20_000, 20_000, zlib.compress(bytes(20_000 * 2_501), 9), bits=1),
        "text.png": _png(4, 4, zlib.compress(bytes(20)), extra=[(b"zTXt", b"Comment\0\0" + exploding_text)]),
        "profile.png": _png(4, 4, zlib.compress(bytes(20)), extra=[(b"iCCP", b"icc\0\0" + exploding_text)]),
        "wide.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6),
        "wide.tif": _tiff([(256, 4, 1, 60_000), (257, 4, 1, 60_000), *_GREY_TAGS, (278, 4, 1, 60_000)]),
        "loop.tif": _tiff([(256, 4, 1, 8)], following=8),
        "tags.tif": _tiff([(256, 4, 0xFFFFFFFF, 8)] * 2000),
        "wide.jpg": _with_size(whole_pictures()["base.jpg"], 65_500, 65_500),
        "wide.webp": b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff" * 6,
    }  # fmt: skip


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _flip_bit(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set_byte(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(len(data))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])


def _flip_in_header(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(min(64, len(data)))] ^= 1 << chance.randrange(8)


def _set_number(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    value = chance.choice([0, 1, 0xFFFF, 2**31 - 1, 2**32 - 1, chance.getrandbits(32)])
    data[start : start + 4] = struct.pack(chance.choice("<>") + "I", value)


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def _remove(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    del data[start : start + chance.randrange(1, 32)]


def _repeat(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    data[start:start] = data[start : start + chance.randrange(1, 64)]


def _insert(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    data[start:start] = chance.randbytes(chance.randrange(1, 32))


_MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [
    _flip_bit, _set_byte, _flip_in_header, _set_number, _cut, _remove, _repeat, _insert,
]  # fmt: skip


def _png(
    width: int, height: int, pixels: bytes, *, bits: int = 8, extra: list[tuple[bytes, bytes]] | None = None
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), *(extra or []), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


_GREY_TAGS = [(258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (279, 4, 1, 0xFFFFFFF0)]


def _tiff(tags: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    """A TIFF that is its directory alone; ``following`` is where the next directory is said to be."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)


def _with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its frame header."""
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]
