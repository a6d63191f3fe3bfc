"""A picture of any size and the one that a base model draws: there and back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from svft_diffusion.data.photos import UnusablePhoto, read_photo
from svft_diffusion.errors import UserError

Box = tuple[int, int, int, int]
"""left, top, right and bottom in pixels, as Pillow has them."""

_WHITE = 128  # from this grey on, a mask's pixel is drawn anew; a soft edge mixes what was drawn with what was there


@dataclass(frozen=True)
class Frame:
    """How a picture lies in the one that is drawn. All boxes and sizes are in pixels, sizes as (width, height).

    Attributes:
        source_size: of the picture.
        source_box: the part of the picture that is edited.
        drawn_size: what the base model draws.
        drawn_box: where that part lies in it; the rest is padding.
    """

    source_size: tuple[int, int]
    source_box: Box
    drawn_size: tuple[int, int]
    drawn_box: Box

    @property
    def is_padded(self) -> bool:
        """Whether some of what is drawn is no part of the picture."""
        return self.drawn_box != (0, 0, *self.drawn_size)

    @property
    def result_size(self) -> tuple[int, int]:
        """Of a result as large as it was drawn, in the shape of the edited part."""
        if self.is_padded:
            return _size_of(self.drawn_box)
        width, height = _size_of(self.source_box)
        scale = min(self.drawn_size[0] / width, self.drawn_size[1] / height)
        return max(1, round(width * scale)), max(1, round(height * scale))

    def fitted(self, picture: Image.Image) -> Image.Image:
        """The picture as the base model sees it; padding mirrors its edges."""
        inside = picture.resize(_size_of(self.drawn_box), Image.Resampling.LANCZOS, box=self.source_box)
        if not self.is_padded:
            return inside
        left, top, right, bottom = self.drawn_box
        margins = ((top, self.drawn_size[1] - bottom), (left, self.drawn_size[0] - right))
        pixels = np.asarray(inside)
        return Image.fromarray(np.pad(pixels, (*margins, *[(0, 0)] * (pixels.ndim - 2)), mode="symmetric"))

    def fitted_mask(self, mask: Image.Image) -> Image.Image:
        """A mask (L) as the base model sees it: black in the padding, white wherever the original is partly white."""
        size = _size_of(self.drawn_box)
        inside = _threshold(mask, _WHITE).resize(size, Image.Resampling.BOX, box=self.source_box)
        fitted = Image.new("L", self.drawn_size, 0)
        fitted.paste(_threshold(inside, 1), self.drawn_box[:2])
        return fitted

    def inside(self) -> Image.Image:
        """White where what is drawn is the picture, black in the padding."""
        mask = Image.new("L", self.drawn_size, 0)
        mask.paste(255, self.drawn_box)
        return mask

    def unfitted(self, drawn: Image.Image) -> Image.Image:
        """What was drawn, without padding and in the shape of the edited part."""
        return _resized(drawn.crop(self.drawn_box), self.result_size)

    def pasted(self, drawn: Image.Image, picture: Image.Image, mask: Image.Image) -> Image.Image:
        """The picture with what was drawn where ``mask`` (L, of its size) is white; the same bits where it is black."""
        result = picture.copy()
        result.paste(_resized(drawn.crop(self.drawn_box), _size_of(self.source_box)), self.source_box[:2])
        return Image.composite(result, picture, mask)


def make_frame(source_size: tuple[int, int], drawn_size: tuple[int, int], fit: str) -> Frame:
    """The frame for a picture; sizes as (width, height).

    Args:
        fit: ``crop`` takes the largest middle part of the drawn shape, ``pad`` and ``resize`` take all of it.
    """
    everything = (0, 0, *drawn_size)
    if fit == "resize":
        return Frame(source_size, (0, 0, *source_size), drawn_size, everything)
    if fit == "crop":
        scale = min(source_size[0] / drawn_size[0], source_size[1] / drawn_size[1])
        taken = (max(1, round(drawn_size[0] * scale)), max(1, round(drawn_size[1] * scale)))
        return Frame(source_size, _middle(source_size, taken), drawn_size, everything)
    scale = min(drawn_size[0] / source_size[0], drawn_size[1] / source_size[1])
    scaled = (max(1, round(source_size[0] * scale)), max(1, round(source_size[1] * scale)))
    return Frame(source_size, (0, 0, *source_size), drawn_size, _middle(drawn_size, scaled))


def open_picture(file: Path) -> Image.Image:
    """A picture, upright, RGB, transparent parts on white.

    Raises:
        UserError: it can't be used, and why.
    """
    return _read(file, "picture")[0]


def open_mask(file: Path, size: tuple[int, int]) -> Image.Image:
    """A mask (L) of a picture of ``size``; what is transparent in it is black.

    Raises:
        UserError: it can't be read, has another size, or leaves nothing to draw.
    """
    image, alpha = _read(file, "mask")
    mask = image.convert("L")
    if alpha is not None:
        mask = ImageChops.multiply(mask, alpha)
    if mask.size != size:
        raise UserError(
            f"the mask {file} has {mask.width}x{mask.height} pixels and the picture {size[0]}x{size[1]}; they must be "
            "the same"
        )
    if not _has_white(mask):
        raise UserError(f"the mask {file} is black all over, so that nothing would change; paint white where to draw")
    return mask


def check_mask_inside(mask: Image.Image, frame: Frame) -> None:
    """Raise `UserError` if the mask asks for something to be drawn that is cut off."""
    outside = mask.copy()
    outside.paste(0, frame.source_box)
    if _has_white(outside):
        raise UserError(
            "part of the mask lies outside of the middle of the picture, which is all that --fit crop takes; use --fit "
            "pad or --fit resize"
        )


def picture_digest(picture: Image.Image) -> str:
    """SHA-256 of a picture's size and pixels, however its file is written."""
    header = f"{picture.mode} {picture.width} {picture.height} ".encode()
    return hashlib.sha256(header + picture.tobytes()).hexdigest()


def _read(file: Path, what: str) -> tuple[Image.Image, Image.Image | None]:
    if not file.is_file():
        raise UserError(f"the {what} {file} is no file" if file.exists() else f"no such {what}: {file}")
    try:
        photo = read_photo(file)
    except UnusablePhoto as problem:
        raise UserError(f"the {what} {file} can't be used: {problem}") from None
    return photo.image, photo.alpha


def _has_white(mask: Image.Image) -> bool:
    return bool((np.asarray(mask) >= _WHITE).any())


def _threshold(mask: Image.Image, least: int) -> Image.Image:
    """White where ``mask`` is at least so light, else black."""
    return mask.point([255 if value >= least else 0 for value in range(256)])


def _middle(outer: tuple[int, int], inner: tuple[int, int]) -> Box:
    left, top = (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2
    return left, top, left + inner[0], top + inner[1]


def _size_of(box: Box) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
