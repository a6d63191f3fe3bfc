"""From a photo to what is trained on: scaled, cut to its training size, flipped; its mask along with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from svft_diffusion.data.buckets import Size, nearest_size
from svft_diffusion.data.dataset import Picture, mask_file
from svft_diffusion.data.order import keyed_generator
from svft_diffusion.data.photos import Photo, UnusablePhoto, read_photo, upright_size
from svft_diffusion.errors import UserError

Value = TypeVar("Value")

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

VARIANTS_KEPT = 4
"""Where cuts are kept instead of made anew, so many of a photo that is cut at random; the passes take them in turn."""

_SAME_SHAPE = 0.02  # relative difference of aspect ratios up to which a mask belongs to a photo of another size


@dataclass(frozen=True)
class Cut:
    """What is trained on of a picture."""

    pixels: Tensor  # (3, H, W) in [-1, 1]
    sizes: Tensor  # (6,): height and width of the picture, top and left of the cut once scaled, H and W
    mask: Tensor | None = None  # (1, H, W) in [0, 1], where the subject is; None: everywhere


@dataclass(frozen=True)
class Cutter:
    """How pictures become training pictures of one of ``sizes``: scaled up or down to cover it, and cut.

    Args:
        sizes: (height, width) pairs; a picture takes that of the nearest shape.
        center_crop: cut in the middle, not at a random place.
        interpolation: one of `INTERPOLATIONS`.
        seed: from which random cuts and flips follow, with the file's name and the variant.
        random_flip: mirror half of the variants.
        masked: read masks, see `read_mask`.
    """

    sizes: tuple[Size, ...]
    center_crop: bool
    interpolation: str
    seed: int
    random_flip: bool = False
    masked: bool = False

    def size_of(self, picture: Picture) -> Size:
        """The training size whose shape is nearest to the picture's."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        return nearest_size(*_again(upright_size, picture.path), self.sizes)

    def cut(self, picture: Picture, variant: int, size: Size | None = None) -> Cut:
        """The ``variant``-th cut of a picture, of its own size or of ``size``.

        Raises:
            UserError: the file changed since it was looked at and can't be used any more.
        """
        photo = _again(read_photo, picture.path)
        height, width = size or self.size_of(picture)
        scaled_height, scaled_width = covering_size(photo.image.height, photo.image.width, height, width)
        top, left = scaled_height - height, scaled_width - width
        if self.center_crop:
            left, top = left // 2, top // 2
        else:
            generator = keyed_generator(self.seed, "crop", picture.path.name, variant)
            left = int(torch.randint(left + 1, (), generator=generator))
            top = int(torch.randint(top + 1, (), generator=generator))
        flipped = self._flipped(picture, variant)

        def part(image: Image.Image) -> Tensor:
            scaled = image.resize((scaled_width, scaled_height), INTERPOLATIONS[self.interpolation])
            taken = scaled.crop((left, top, left + width, top + height))
            if flipped:
                taken = taken.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return torch.from_numpy(np.asarray(taken).copy())

        mask = read_mask(picture.path, photo) if self.masked else None
        left_as_seen = scaled_width - width - left if flipped else left
        sizes = [photo.image.height, photo.image.width, top, left_as_seen, height, width]
        return Cut(
            pixels=part(photo.image).permute(2, 0, 1).float() / 127.5 - 1.0,
            sizes=torch.tensor(sizes, dtype=torch.float32),
            mask=None if mask is None else part(mask)[None].float() / 255.0,
        )

    def number_of_variants(self, picture: Picture, size: Size | None = None) -> int:
        """How many different cuts are worth keeping; flips come in pairs."""
        size = size or self.size_of(picture)
        only_one = self.center_crop or covering_size(*_again(upright_size, picture.path), *size) == size
        if only_one:
            return 2 if self.random_flip else 1
        return VARIANTS_KEPT

    def _flipped(self, picture: Picture, variant: int) -> bool:
        """By chance, but one of each pair of variants is mirrored and one is not: few are seen of few photos."""
        if not self.random_flip:
            return False
        generator = keyed_generator(self.seed, "flip", picture.path.name, variant // 2)
        return bool(int(torch.randint(2, (), generator=generator)) ^ variant & 1)


def read_mask(path: Path, photo: Photo) -> Image.Image | None:
    """Where the subject is in a photo: white in ``NAME.mask.png`` beside it, else what is opaque; else None.

    What is transparent in the mask's file counts as black.

    Raises:
        UserError: the mask can't be read, has another shape than the photo, or leaves nothing of it.
    """
    file = mask_file(path)
    if not file.is_file():
        if photo.alpha is not None and photo.alpha.getextrema() == (0, 0):
            raise UserError(f"{path} is transparent all over, so that --masked_loss leaves nothing of it to train on")
        return photo.alpha
    try:
        drawn = read_photo(file)
    except UnusablePhoto as problem:
        raise UserError(f"the mask {file} can't be used: {problem}") from None
    mask = drawn.image.convert("L")
    if drawn.alpha is not None:
        mask = ImageChops.multiply(mask, drawn.alpha)
    size = photo.image.size
    ratio = (mask.width / mask.height) / (size[0] / size[1])
    if not 1 - _SAME_SHAPE <= ratio <= 1 + _SAME_SHAPE:
        raise UserError(
            f"the mask {file} has {mask.width}x{mask.height} pixels and its photo {size[0]}x{size[1]}: another shape; "
            "make it from the photo as it is now"
        )
    if mask.getextrema()[1] == 0:
        raise UserError(f"the mask {file} is black all over; paint the subject white, or remove the file")
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def covering_size(height: int, width: int, target_height: int, target_width: int) -> Size:
    """Height and width of a picture scaled just so that it covers the target."""
    scale = max(target_height / height, target_width / width)
    return max(target_height, round(height * scale)), max(target_width, round(width * scale))


def _again(read: Callable[[Path], Value], path: Path) -> Value:
    """What ``read`` says of a file that was usable when the run began. Raises `UserError` if it is not any more."""
    try:
        return read(path)
    except (UnusablePhoto, FileNotFoundError) as problem:
        raise UserError(f"{path} can't be used any more: {problem}") from problem
