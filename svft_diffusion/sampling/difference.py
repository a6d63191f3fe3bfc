"""How two pictures of the same size differ."""

from __future__ import annotations

from typing import NamedTuple

import numpy
from PIL import Image

from svft_diffusion.errors import UserError


class Difference(NamedTuple):
    """Two pictures, compared pixel by pixel and channel by channel.

    Attributes:
        image: absolute differences, black where there are none, times ``factor``.
        factor: the largest whole number at which none of them is cut off, 1 for equal pictures.
        mean: of the differences, as a share of the range from black to white.
        largest: of them, likewise.
    """

    image: Image.Image
    factor: int
    mean: float
    largest: float


def difference(first: Image.Image, second: Image.Image) -> Difference:
    """Compare two pictures.

    Raises:
        UserError: they are of different sizes.
    """
    if first.size != second.size:
        sizes = " and ".join(f"{image.width} x {image.height}" for image in (first, second))
        raise UserError(f"pictures of different sizes can't be compared: {sizes}")
    pixels = [numpy.asarray(image.convert("RGB"), dtype=numpy.int16) for image in (first, second)]
    apart = numpy.abs(pixels[0] - pixels[1])
    largest = int(apart.max())
    factor = 255 // largest if largest else 1
    image = Image.fromarray((apart * factor).astype(numpy.uint8), "RGB")
    return Difference(image, factor, float(apart.mean()) / 255, largest / 255)
