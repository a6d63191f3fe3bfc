"""Photos as they come from people's folders: which files are usable, and how a file becomes an RGB picture."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from svft_diffusion.errors import UserError

PIXEL_LIMIT = 64_000_000
"""Larger pictures are refused from their header alone: a file of half a megabyte can claim a gigabyte of pixels."""

LONGEST_SHAPE = 32
"""Times as long as wide. Longer pictures are refused: scaled until the narrow side is of the training size, a file of
some hundred bytes would take all memory."""

MASK_SUFFIX = ".mask.png"
"""``dog.mask.png`` says which part of ``dog.jpg`` is the subject; it is no photo itself."""

# Few decoders see files of unknown origin. Phones' multi-picture JPEGs open as JPEG.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
_HEIF_SUFFIXES = (".heic", ".heif")
_OTHER_PICTURE_SUFFIXES = (
    ".gif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
)  # fmt: skip

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnusablePhoto(Exception):
    """A file that can't be used as a photo; the message says why."""


@dataclass(frozen=True)
class Photo:
    """A photo, decoded."""

    image: Image.Image  # RGB, upright
    alpha: Image.Image | None  # L, of the same size: how opaque every pixel is; None if all of them are
    turned: bool  # it stands upright only because its EXIF data say how the camera was held
    frames: int  # pictures in the file, of which this is the first


@dataclass(frozen=True)
class SkippedFile:
    """A file or folder inside a photo folder that is not used."""

    path: Path
    reason: str
    is_picture: bool = False  # by its name it is one, so that somebody may have counted on it


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

    @property
    def unusable_pictures(self) -> list[SkippedFile]:
        """Skipped files that look as if they should be photos."""
        return [file for file in self.skipped if file.is_picture]


def scan_photos(folder: Path) -> PhotoFolder:
    """Look at everything directly in ``folder``; each photo is decoded once, so a broken one is known beforehand.

    Raises:
        UserError: no such folder, or no usable photo in it; the message lists what was skipped.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder" if folder.exists() else f"no such folder: {folder}")
    try:
        paths = sorted(folder.iterdir())
    except OSError as problem:
        raise UserError(f"the folder {folder} can't be read: {problem.strerror or problem}") from None
    photos: list[Path] = []
    skipped: list[SkippedFile] = []
    for path in paths:
        reason = _refused_by_name(path)
        if reason is not None:
            is_picture = path.suffix.lower() in (*_HEIF_SUFFIXES, *_OTHER_PICTURE_SUFFIXES) and path.is_file()
            skipped.append(SkippedFile(path, reason, is_picture))
            continue
        try:
            open_photo(path)
        except UnusablePhoto as problem:
            skipped.append(SkippedFile(path, str(problem), is_picture=True))
        else:
            photos.append(path)
    found = PhotoFolder(photos, skipped)
    if not photos:
        raise UserError(f"no usable photo in {folder}: {found.report() or 'it is empty'}")
    return found


def open_photo(path: Path) -> Image.Image:
    """The picture in ``path`` as RGB, upright (EXIF), transparent parts on white, 16-bit values scaled to 8 bits.

    Raises:
        UnusablePhoto: see `read_photo`.
    """
    return read_photo(path).image


def read_photo(path: Path) -> Photo:
    """As `open_photo`, with what else is known of the photo. Of an animated file the first picture is taken.

    Raises:
        UnusablePhoto: not a picture, damaged, of more than `PIXEL_LIMIT` pixels, or longer than `LONGEST_SHAPE`.
    """
    formats = _readable_formats(path)
    try:
        with warnings.catch_warnings():
            # Pillow's own limit is a warning; others, on odd metadata, are nobody's concern here.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats) as image:
                if image.width * image.height > PIXEL_LIMIT:
                    raise UnusablePhoto(f"{image.width}x{image.height} pixels are too many")
                if max(image.size) > LONGEST_SHAPE * min(image.size):
                    raise UnusablePhoto(f"{image.width}x{image.height} pixels are too long and narrow")
                frames = int(getattr(image, "n_frames", 1)) if image.format != "MPO" else 1
                image.load()
                turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
                upright = image.transpose(turn) if turn is not None else image.copy()
                rgb, alpha = _as_rgb(upright)
    except UnusablePhoto:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UnusablePhoto("too many pixels") from None
    except UnidentifiedImageError:
        raise UnusablePhoto("empty file" if path.stat().st_size == 0 else "no readable picture") from None
    except PermissionError as problem:
        raise UnusablePhoto(f"can't be read: {problem.strerror}") from None
    except FileNotFoundError:
        raise UnusablePhoto("it is gone") from None
    # Damaged files raise every kind of exception in the decoders, such as struct.error and KeyError.
    except Exception as problem:
        raise UnusablePhoto(f"damaged: {_first_line(problem)}") from None
    return Photo(rgb, alpha, turned=turn is not None, frames=frames)


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of a usable photo, from its header. Raises `UnusablePhoto` if it can't be read any more."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_readable_formats(path)) as image:
                width, height = image.size
                on_its_side = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    except Exception as problem:  # as in `read_photo`
        raise UnusablePhoto(f"damaged: {_first_line(problem)}") from None
    return (width, height) if on_its_side else (height, width)


def is_mask(path: Path) -> bool:
    """Whether a file is a photo's mask by its name."""
    return path.name.lower().endswith(MASK_SUFFIX)


def _refused_by_name(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if path.name.startswith("."):
        return "hidden folder" if path.is_dir() else "hidden file"
    if path.is_dir():
        return "folder"
    if not path.is_file():
        return "no regular file"  # reading a pipe would wait for ever
    if is_mask(path):
        return "a mask"
    if suffix in _HEIF_SUFFIXES:
        if importlib.util.find_spec("pillow_heif") is None:
            return "HEIC needs the package pillow-heif: pip install 'svft-diffusion[heic]'"
        return None
    if suffix in _OTHER_PICTURE_SUFFIXES:
        return f"{suffix[1:].upper()} is not read; save it as PNG or JPEG"
    return None if suffix in _SUFFIXES else "not a picture"


def _readable_formats(path: Path) -> tuple[str, ...]:
    if path.suffix.lower() not in _HEIF_SUFFIXES:
        return _FORMATS
    try:
        import pillow_heif
    except ImportError:
        raise UnusablePhoto("HEIC needs the package pillow-heif: pip install 'svft-diffusion[heic]'") from None
    pillow_heif.register_heif_opener()
    return (*_FORMATS, "HEIF")


def _as_rgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """RGB with transparent parts on white, and the alpha channel if anything is transparent."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image), None
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    layered = image.convert("RGBA")
    alpha = layered.getchannel("A")
    on_white = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return on_white, alpha if alpha.getextrema() != (255, 255) else None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits; Pillow's own conversion would clip all above 255 to white."""
    values = np.asarray(image).astype(np.float32)
    if not np.isfinite(values).all():
        raise UnusablePhoto("damaged: pixels are not finite")
    largest = max(float(values.max()), 1.0) if image.mode == "F" else 65535.0
    grey = np.clip(values / largest * 255.0, 0.0, 255.0).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
