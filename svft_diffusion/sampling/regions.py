"""Where in a picture an adapter acts: a box, or what is white in a mask."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops
from torch import Tensor
from torch.nn import functional

from svft_diffusion.errors import UserError

_MOST_PIXELS = 64_000_000
_FORMS = "a box [left, top, right, bottom] in parts of the picture, such as [0, 0, 0.5, 1], or {mask: FILE}"


@dataclass(frozen=True)
class Region:
    """A part of the picture, and what the prompt is there.

    Where two regions overlap, both count alike; where there is none, the prompt and the adapters without a region.
    """

    box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom as parts of width and height; or:"""
    mask: Path | None = None
    """a picture: white where the region is, black where it is not, grey in between; it is stretched to fit."""
    prompt: str | None = None
    """What the region shows; the prompt of the whole picture if None."""

    def __post_init__(self) -> None:
        if (self.box is None) == (self.mask is None):
            raise UserError(f"a region is {_FORMS}")
        if self.box is not None:
            left, top, right, bottom = self.box
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise UserError(f"a box is [left, top, right, bottom] with 0 <= left < right <= 1; got {[*self.box]}")

    def coverage(self, height: int, width: int) -> Tensor:
        """How much of each cell of a grid the region covers: (height, width), from 0 to 1.

        Raises:
            UserError: the mask can't be read.
        """
        if self.box is not None:
            left, top, right, bottom = self.box
            return _overlap(top, bottom, height)[:, None] * _overlap(left, right, width)[None, :]
        assert self.mask is not None
        pixels = torch.from_numpy(read_mask(self.mask))[None, None]
        return functional.interpolate(pixels, (height, width), mode="area")[0, 0]


def read_mask(file: Path) -> NDArray[np.float32]:
    """A mask as (height, width), black 0 and white 1; what is transparent is 0.

    Raises:
        UserError: it can't be read, or covers nothing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=["PNG"]) as picture:
                if picture.width * picture.height > _MOST_PIXELS:
                    raise UserError(f"the mask {file} has {picture.width}x{picture.height} pixels, which are too many")
                mask = _lightness(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        reason = "no such file" if isinstance(problem, FileNotFoundError) else getattr(problem, "strerror", None)
        raise UserError(f"the mask {file} can't be read as a PNG picture: {reason or problem}") from problem
    if not mask.any():
        raise UserError(f"the mask {file} is black everywhere; it must be white where the adapter acts")
    return mask


def _lightness(picture: Image.Image) -> NDArray[np.float32]:
    if picture.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip all above 255 to white
        return np.asarray(picture, dtype=np.float32) / np.float32(65535)
    grey = picture.convert("L")
    if picture.has_transparency_data:
        grey = ImageChops.multiply(grey, picture.convert("RGBA").getchannel("A"))
    return np.asarray(grey, dtype=np.float32) / np.float32(255)


def parse_region(value: object) -> Region:
    """A region from what YAML and JSON hold.

    ``[0, 0, 0.5, 1]``, ``{"box": [0, 0, 0.5, 1], "prompt": "a photo of sks dog"}`` or ``{"mask": "left.png"}``.

    Raises:
        UserError: anything else.
    """
    if isinstance(value, Mapping):
        if unknown := value.keys() - {"box", "mask", "prompt"}:
            raise UserError(
                f"a region has no {sorted(map(str, unknown))[0]!r}; it is {_FORMS}, and a prompt if need be"
            )
        mask, prompt = value.get("mask"), value.get("prompt")
        if not isinstance(mask, str | None) or not isinstance(prompt, str | None):
            raise UserError(f"mask and prompt of a region are text; got {dict(value)!r}")
        box = None if value.get("box") is None else _parse_box(value["box"])
        return Region(box, None if mask is None else Path(mask), prompt)
    return Region(_parse_box(value))


def region_to_json(region: Region) -> dict[str, object]:
    """What `parse_region` makes the same region of."""
    fields = {
        "box": None if region.box is None else [*region.box],
        "mask": None if region.mask is None else str(region.mask),
        "prompt": region.prompt,
    }
    return {name: value for name, value in fields.items() if value is not None}


def shares(regions: Sequence[Region], height: int, width: int) -> Tensor:
    """How much each region counts in each cell, (1 + regions, height, width): first what no region covers.

    In every cell the shares add up to 1.
    """
    covered = torch.stack([region.coverage(height, width) for region in regions])
    total = covered.sum(dim=0, keepdim=True)
    return torch.cat([(1 - total).clamp(min=0), covered / total.clamp(min=1)])


def _overlap(start: float, end: float, cells: int) -> Tensor:
    """Part of each of ``cells`` equal cells of [0, 1] that lies in [start, end]."""
    edges = torch.arange(cells + 1, dtype=torch.float32)
    return (edges[1:].clamp(max=end * cells) - edges[:-1].clamp(min=start * cells)).clamp(min=0)


def _parse_box(value: object) -> tuple[float, float, float, float]:
    numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(numbers) != 4 or any(
        isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number)
        for number in numbers
    ):
        raise UserError(f"a region is {_FORMS}; got {value!r}")
    left, top, right, bottom = map(float, numbers)
    return left, top, right, bottom
