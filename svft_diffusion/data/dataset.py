"""Training pictures: photos and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svft_diffusion.data.captions import Captions
from svft_diffusion.data.photos import MASK_SUFFIX, PhotoFolder


@dataclass(frozen=True)
class Picture:
    """One picture to train on and the prompt that describes it."""

    path: Path
    prompt: str
    subject: int = 0  # which of the run's subjects it shows, or the class of which


def pictures_with_prompts(
    found: PhotoFolder, prompt: str, captions: Captions | None = None, subject: int = 0
) -> list[Picture]:
    """The photos of a folder, each with its caption, or ``prompt`` where it has none."""
    by_name = captions.by_name if captions is not None else {}
    return [Picture(photo, by_name.get(photo.name, prompt), subject) for photo in found.photos]


def mask_file(photo: Path) -> Path:
    """Where the mask of a photo would be: ``dog.mask.png`` for ``dog.jpg``."""
    return photo.with_name(photo.stem + MASK_SUFFIX)


def distinct_prompts(*groups: Sequence[Picture]) -> list[str]:
    """Every prompt once, in the order of first use."""
    return list(dict.fromkeys(picture.prompt for group in groups for picture in group))
