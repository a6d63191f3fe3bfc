"""A look at the photos before training: with four of them, a bad one is a quarter of all that is learned.

The thresholds were set on 30 photos of six subjects of the DreamBooth dataset (CC BY 4.0) and on changed copies of
them; each constant says what was measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from svft_diffusion.data.buckets import Size
from svft_diffusion.data.cutting import Cutter, covering_size
from svft_diffusion.data.dataset import Picture, pictures_with_prompts
from svft_diffusion.data.photos import SkippedFile, UnusablePhoto, read_photo, scan_photos
from svft_diffusion.errors import UserError

MOST_PHOTOS = 200
"""Of more photos the first ones are looked at: pairs are compared, and one bad photo among so many does little."""

_SIGNS_SIDE = 16
_LEAST_STEP = 4  # of 255 grey values: below it a place is flat, as walls are, and says nothing
_MOST_DIFFERENT = 0.42
"""Share of the signs. Different photos of one subject differed in 0.58 or more, drawings before one colour in 0.53,
copies of another size or compression in 0.06 or less, and copies without the outer 3 % in 0.40 or less."""

_SHARPNESS_SIDE = 512
_SHARPNESS_TILES = 8
_LEAST_SHARPNESS = 200.0
"""Variance of the Laplacian of grey values in the sharpest of 8 x 8 tiles, so that a smooth wall behind the subject is
no blur. Photos had 452 or more at 512 pixels, and after a Gaussian blur of 2 pixels there, 48 or less."""
_LEAST_SHARPNESS_OF_MEDIAN = 1 / 16  # photos had a tenth of their subject's median or more

_BORDER_SHARE = 1 / 6
_SAME_BORDER = 0.75
_SAME_BORDER_PHOTOS = 3 / 4
"""Overlap of colour histograms of the border. In front of one plain wall it was 0.83 to 0.91; of photos from several
places, pairs above 0.75 never joined more than 3 of 5."""

_MOST_ENLARGED = 1.1  # a tenth more pixels than there are is not to be seen
_LEAST_SEEN = 0.5  # of a photo's area: below that, a random cut easily misses the subject
_MOST_NAMES = 8


@dataclass(frozen=True)
class _Facts:
    """What a photo is, measured."""

    name: str
    size: Size
    enlarged: float  # by what factor, to cover its training size
    seen: float  # part of its area that one cut shows
    turned: bool
    frames: int
    transparent: bool
    signs: tuple[np.ndarray, np.ndarray]  # of the photo and of its mirror image, see `_signs_of_steps`
    sharpness: float
    border: np.ndarray  # histogram of 512 colours, sum 1


@dataclass(frozen=True)
class FolderReport:
    """What a folder of photos is like."""

    pictures: list[Picture]  # those that can be used
    skipped: list[SkippedFile]
    notes: list[str]  # on the usable ones, see `photo_notes`


def check_folder(folder: Path, cutter: Cutter) -> FolderReport:
    """Look at the photos of one subject, as training with ``cutter`` would see them.

    Raises:
        UserError: no such folder, or no usable photo in it.
    """
    found = scan_photos(folder)
    pictures = pictures_with_prompts(found, "")
    return FolderReport(pictures, found.skipped, photo_notes(pictures, cutter))


def photo_notes(pictures: Sequence[Picture], cutter: Cutter) -> list[str]:
    """What is worth a second look about photos of one subject, each in one line; nothing is refused.

    Raises:
        UserError: a photo that was usable before can't be read any more.
    """
    facts = [_facts_of(picture, cutter) for picture in pictures[:MOST_PHOTOS]]
    notes = _copies(facts) + _blurred(facts) + _small(facts) + _long(facts) + _same_background(facts)
    if turned := [fact.name for fact in facts if fact.turned]:
        notes.append(f"upright only by their EXIF data, which other programs may ignore: {_names(turned)}")
    if animated := [f"{fact.name} (1 of {fact.frames})" for fact in facts if fact.frames > 1]:
        notes.append(f"several pictures in one file, of which the first is used: {_names(animated)}")
    if not cutter.masked and (transparent := [fact.name for fact in facts if fact.transparent]):
        notes.append(f"transparent parts become white and are learned so, without --masked_loss: {_names(transparent)}")
    if len(pictures) > MOST_PHOTOS:
        notes.append(f"the first {MOST_PHOTOS} of {len(pictures)} photos were looked at")
    return notes


def _facts_of(picture: Picture, cutter: Cutter) -> _Facts:
    try:
        photo = read_photo(picture.path)
    except UnusablePhoto as problem:
        raise UserError(f"{picture.path} can't be used any more: {problem}") from None
    image = photo.image
    height, width = cutter.size_of(picture)
    covering = covering_size(image.height, image.width, height, width)
    return _Facts(
        name=picture.path.name,
        size=(image.height, image.width),
        enlarged=max(height / image.height, width / image.width),
        seen=height * width / (covering[0] * covering[1]),
        turned=photo.turned,
        frames=photo.frames,
        transparent=photo.alpha is not None,
        signs=(_signs_of_steps(image), _signs_of_steps(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))),
        sharpness=_sharpness(image, min(height, width, _SHARPNESS_SIDE)),
        border=_border_colours(image),
    )


def _signs_of_steps(image: Image.Image) -> np.ndarray:
    """Where a small grey copy becomes brighter (1) or darker (-1) from left to right, or stays as it is (0); 256 signs.

    N. Krawetz's dHash with a third value.
    """
    small = image.convert("L").resize((_SIGNS_SIDE + 1, _SIGNS_SIDE), Image.Resampling.LANCZOS)
    steps = np.diff(np.asarray(small, dtype=np.int16), axis=1).ravel()
    signs: np.ndarray = np.where(np.abs(steps) < _LEAST_STEP, 0, np.sign(steps))
    return signs


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    """Share of the signs that differ, among those where one of the photos is not flat."""
    counted = (first != 0) | (second != 0)
    return float((first != second)[counted].mean()) if counted.any() else 0.0


def _sharpness(image: Image.Image, side: int) -> float:
    """Variance of the Laplacian in the sharpest tile, the shorter side scaled to ``side``, as training sees it."""
    scale = side / min(image.size)
    least = _SHARPNESS_TILES + 2
    size = (max(least, round(image.width * scale)), max(least, round(image.height * scale)))
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), dtype=np.float64)
    neighbours = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    laplacian = neighbours - 4 * grey[1:-1, 1:-1]
    bands = np.array_split(laplacian, _SHARPNESS_TILES)
    return max(float(tile.var()) for band in bands for tile in np.array_split(band, _SHARPNESS_TILES, axis=1))


def _border_colours(image: Image.Image) -> np.ndarray:
    """Histogram of the colours of the outer sixth on each side, in 8 steps for each channel."""
    side = 128
    ring = round(side * _BORDER_SHARE)
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BOX))
    outer = np.ones((side, side), dtype=bool)
    outer[ring:-ring, ring:-ring] = False
    steps = (pixels[outer] // 32).astype(np.int64)
    counts = np.bincount(steps @ np.array([64, 8, 1]), minlength=512)
    shares: np.ndarray = counts / counts.sum()
    return shares


def _copies(facts: Sequence[_Facts]) -> list[str]:
    notes = []
    for first, second in itertools.combinations(facts, 2):
        as_is, mirrored = (_difference(first.signs[0], other) for other in second.signs)
        if min(as_is, mirrored) <= _MOST_DIFFERENT:
            kind = "nearly the same photo" if as_is <= mirrored else "nearly mirror images"
            notes.append(f"{first.name} and {second.name} are {kind}: what both show counts twice")
    if len(notes) > _MOST_NAMES:
        notes[_MOST_NAMES:] = [f"and {len(notes) - _MOST_NAMES} more pairs of nearly the same photo"]
    return notes


def _blurred(facts: Sequence[_Facts]) -> list[str]:
    least = max(_LEAST_SHARPNESS, _LEAST_SHARPNESS_OF_MEDIAN * float(np.median([fact.sharpness for fact in facts])))
    blurred = [fact.name for fact in facts if fact.sharpness < least]
    return [f"blurred, and blur is learned too: {_names(blurred)}"] if blurred else []


def _small(facts: Sequence[_Facts]) -> list[str]:
    small = [
        f"{fact.name} ({fact.size[1]}x{fact.size[0]} pixels, {fact.enlarged:.1f} times)"
        for fact in facts
        if fact.enlarged > _MOST_ENLARGED
    ]
    return [f"too small for the resolution, so that they are enlarged: {_names(small)}"] if small else []


def _long(facts: Sequence[_Facts]) -> list[str]:
    long = [f"{fact.name} ({fact.size[1]}x{fact.size[0]} pixels)" for fact in facts if fact.seen < _LEAST_SEEN]
    if not long:
        return []
    return [
        f"more than half is cut off each time, maybe the subject: {_names(long)}; cut them yourself, or use "
        "--aspect_ratio_buckets auto"
    ]


def _same_background(facts: Sequence[_Facts]) -> list[str]:
    if len(facts) < 3:
        return []
    borders = np.stack([fact.border for fact in facts])
    alike = max(int((np.minimum(border, borders).sum(axis=1) >= _SAME_BORDER).sum()) for border in borders)
    if alike < _SAME_BORDER_PHOTOS * len(facts):
        return []
    return [
        f"the same background in {alike} of {len(facts)} photos: what is the same in all is learned as part of the "
        "subject; take some elsewhere, or use --masked_loss"
    ]


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
