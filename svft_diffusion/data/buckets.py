"""Shapes of training pictures beside the square: a list of them, and which one fits a photo best."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from svft_diffusion.errors import UserError

Size = tuple[int, int]
"""(height, width) in pixels."""

AUTOMATIC = "auto"
SIDE_MULTIPLE = 8  # latents of most base models are smaller by this factor
_STEP_SHARE = 8  # sides of automatic sizes are multiples of an eighth of the resolution: 64 for 512, 128 for 1024
_WIDEST = 2.0  # a photo that is longer still loses its ends; such shapes lie far from what base models were trained on


def parse_sizes(text: str) -> list[Size] | None:
    """``"1024,1024;768,1360"`` as (height, width) pairs; None for ``auto``.

    Raises:
        UserError: anything else, sides that are no multiples of 8, or a size that is there twice.
    """
    if text.strip() == AUTOMATIC:
        return None
    sizes: list[Size] = []
    for part in text.strip().strip(";").split(";"):
        match = re.fullmatch(r"\s*(\d{1,5})\s*,\s*(\d{1,5})\s*", part)
        if match is None:
            raise UserError(
                f"--aspect_ratio_buckets: expected 'height,width;height,width' such as '1024,1024;768,1360', or "
                f"{AUTOMATIC}, got {part.strip()!r}"
            )
        size = (int(match[1]), int(match[2]))
        if any(side < SIDE_MULTIPLE or side % SIDE_MULTIPLE for side in size):
            raise UserError(
                f"--aspect_ratio_buckets: sides must be multiples of {SIDE_MULTIPLE}, got {size[0]},{size[1]}"
            )
        if size in sizes:
            raise UserError(f"--aspect_ratio_buckets: {size[0]},{size[1]} is there twice; leave one out")
        sizes.append(size)
    return sizes


def automatic_sizes(resolution: int, multiple: int = SIDE_MULTIPLE) -> list[Size]:
    """Sizes between 2:1 and 1:2, each with about ``resolution``² pixels and never more.

    Args:
        multiple: what sides must be multiples of.
    """
    step = max(multiple, resolution // _STEP_SHARE // multiple * multiple)
    sizes: list[Size] = [(resolution, resolution)]
    for width in range(resolution + step, math.floor(resolution * _WIDEST**0.5) + 1, step):
        height = resolution**2 // width // step * step
        sizes += [(height, width), (width, height)]
    return sizes


def nearest_size(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The size whose shape is nearest to a photo's; the ratio of both ratios counts, so that wide equals tall."""
    return min(sizes, key=lambda size: abs(math.log(width / height) - math.log(size[1] / size[0])))
