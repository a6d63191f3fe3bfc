"""Photos as they come from people's folders: which files are usable, and how a file becomes an RGB picture."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from svft_diffusion.errors import UserError

PIXEL_LIMIT = 64_000_000
"""Larger pictures are refused from their header alone: a file of half a megabyte can claim a gigabyte of pixels."""

# Few decoders see files of unknown origin. Phones' multi-picture JPEGs open as JPEG.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class UnusablePhoto(Exception):
    """A file that can't be used as a photo; the message says why."""


@dataclass(frozen=True)
class SkippedFile:
    """A file of a photo folder that is not used."""

    path: Path
    reason: str


@dataclass(frozen=True)
class PhotoFolder:
    """What a folder holds: the usable photos in the order of their names, and the rest with reasons."""

    photos: list[Path]
    skipped: list[SkippedFile]

    def report(self) -> str:
        """The skipped files in one line, or nothing."""
        if not self.skipped:
            return ""
        return "skipped " + ", ".join(f"{file.path.name} ({file.reason})" for file in self.skipped)


def scan_photos(folder: Path) -> PhotoFolder:
    """Look at every file directly in ``folder``; each photo is decoded once, so a broken one is known beforehand.

    Raises:
        UserError: no such folder, or no usable photo in it; the message lists what was skipped.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder" if folder.exists() else f"no such folder: {folder}")
    photos: list[Path] = []
    skipped: list[SkippedFile] = []
    for path in sorted(path for path in folder.iterdir() if not path.is_dir()):
        try:
            _refuse_by_name(path)
            open_photo(path)
        except UnusablePhoto as problem:
            skipped.append(SkippedFile(path, str(problem)))
        else:
            photos.append(path)
    found = PhotoFolder(photos, skipped)
    if not photos:
        raise UserError(f"no usable photo in {folder}: {found.report() or 'it is empty'}")
    return found


def open_photo(path: Path) -> Image.Image:
    """The picture in ``path`` as RGB, upright (EXIF), transparent parts on white, 16-bit values scaled to 8 bits.

    Raises:
        UnusablePhoto: not a picture, damaged, or of more than `PIXEL_LIMIT` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > PIXEL_LIMIT:
                    raise UnusablePhoto(f"{image.width}x{image.height} pixels are too many")
                image.load()
                upright = ImageOps.exif_transpose(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UnusablePhoto("too many pixels") from None
    except UnidentifiedImageError:
        raise UnusablePhoto("empty file" if path.stat().st_size == 0 else "no readable picture") from None
    # Damaged files raise many kinds of exception in the decoders.
    except (OSError, ValueError, SyntaxError, TypeError, EOFError, IndexError, OverflowError, MemoryError) as problem:
        raise UnusablePhoto(f"damaged: {problem}") from None
    return _as_rgb(upright)


def _refuse_by_name(path: Path) -> None:
    if path.name.startswith("."):
        raise UnusablePhoto("hidden file")
    if path.suffix.lower() not in _SUFFIXES:
        raise UnusablePhoto("not a picture")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image)
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits; Pillow's own conversion would clip all above 255 to white."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise UnusablePhoto("damaged: pixels are not finite")
    largest = max(float(values.max()), 1.0) if image.mode == "F" else 65535.0
    grey = np.clip(values / largest * 255.0, 0.0, 255.0).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
