"""Training pictures: photos with their prompts, cut to squares, in an order that follows from the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from svft_diffusion.data.photos import PhotoFolder, UnusablePhoto, open_photo
from svft_diffusion.errors import UserError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Picture:
    """One picture to train on and the prompt that describes it."""

    path: Path
    prompt: str


@dataclass(frozen=True)
class SquareCrop:
    """How a picture becomes a square of ``resolution`` pixels: its shorter side is scaled to that, up or down."""

    resolution: int
    center_crop: bool
    interpolation: str
    seed: int

    def pixels(self, picture: Picture, variant: int) -> Tensor:
        """The picture as a tensor (3, resolution, resolution) in [-1, 1].

        Where the longer side sticks out, the cut is in the middle with ``center_crop`` and otherwise at a place
        that follows from the seed, the file's name and ``variant``.

        Raises:
            UserError: the file changed since it was looked at and can't be used any more.
        """
        image = _open_again(picture.path)
        scale = self.resolution / min(image.size)
        width, height = (max(self.resolution, round(side * scale)) for side in image.size)
        image = image.resize((width, height), INTERPOLATIONS[self.interpolation])
        left, top = width - self.resolution, height - self.resolution
        if self.center_crop:
            left, top = left // 2, top // 2
        else:
            generator = keyed_generator(self.seed, "crop", picture.path.name, variant)
            left = int(torch.randint(left + 1, (), generator=generator))
            top = int(torch.randint(top + 1, (), generator=generator))
        square = image.crop((left, top, left + self.resolution, top + self.resolution))
        values = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)
        return values.float() / 127.5 - 1.0

    def number_of_variants(self, picture: Picture, limit: int) -> int:
        """How many different crops are worth keeping: one where there is nothing to choose, else ``limit``."""
        if self.center_crop:
            return 1
        width, height = _open_again(picture.path).size
        return 1 if width == height else limit


class ShuffledOrder:
    """Passes over ``count`` pictures without end, each pass in its own random order.

    Which picture is the n-th of the run follows from the seed and ``n`` alone, so a resumed run and several
    processes need no state of iterators.
    """

    def __init__(self, count: int, seed: int, purpose: str) -> None:
        self.count = count
        self.seed = seed
        self.purpose = purpose
        self._pass_number = -1
        self._order: list[int] = []

    def locate(self, sample: int) -> tuple[int, int]:
        """(index of the picture, number of the pass) of the n-th sample of the run."""
        pass_number, position = divmod(sample, self.count)
        if pass_number != self._pass_number:
            generator = keyed_generator(self.seed, "order", self.purpose, pass_number)
            self._order = torch.randperm(self.count, generator=generator).tolist()
            self._pass_number = pass_number
        return self._order[position], pass_number


def keyed_generator(seed: int, *key: object) -> torch.Generator:
    """A CPU generator whose numbers follow from the seed and a key, on every machine and in every process."""
    digest = hashlib.blake2b("|".join(map(str, (seed, *key))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def pictures_with_prompts(found: PhotoFolder, prompt: str, caption_source: str) -> list[Picture]:
    """The photos of a folder with their prompts: one for all, or each from its sidecar file.

    Args:
        found: what the folder holds.
        prompt: the prompt of every photo; with sidecar files, of those that have none.
        caption_source: ``none``, or ``txt``: ``dog.txt`` holds the whole prompt of ``dog.jpg``.

    Raises:
        UserError: a sidecar file is empty or not readable as UTF-8.
    """
    if caption_source == "none":
        return [Picture(photo, prompt) for photo in found.photos]
    return [Picture(photo, _sidecar_prompt(photo) or prompt) for photo in found.photos]


def _sidecar_prompt(photo: Path) -> str | None:
    sidecar = photo.with_suffix(".txt")
    if not sidecar.is_file():
        return None
    try:
        caption = " ".join(sidecar.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"the caption file {sidecar} can't be read as UTF-8 text: {problem}") from None
    if not caption:
        raise UserError(f"the caption file {sidecar} is empty; write the photo's prompt into it or remove it")
    return caption


def distinct_prompts(*groups: Sequence[Picture]) -> list[str]:
    """Every prompt once, in the order of first use."""
    return list(dict.fromkeys(picture.prompt for group in groups for picture in group))


def _open_again(path: Path) -> Image.Image:
    """As `open_photo`, for files that were usable when the run began.

    Raises:
        UserError: the file can't be used any more.
    """
    try:
        return open_photo(path)
    except (UnusablePhoto, FileNotFoundError) as problem:
        raise UserError(f"{path} can't be used any more: {problem}") from problem
