"""Contact sheets: what was scored, beside the real photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from svft_diffusion.evaluation.scoring import PromptedPictures
from svft_diffusion.sampling.grid import labelled_grid
from svft_diffusion.sampling.png import save_png

_MOST_ROWS_OF_STRIP = 8
_CELL = 160  # pixels


def write_sheet(file: Path, drawn: PromptedPictures, photos: Sequence[Image.Image]) -> None:
    """A row of real photos, as many as a prompt has pictures, and below them a row for each prompt.

    Raises:
        UserError: the file can't be written.
    """
    rows: dict[str, list[Image.Image]] = {}
    for picture, prompt in zip(drawn.pictures, drawn.prompts, strict=True):
        rows.setdefault(prompt or "", []).append(picture)
    columns = max(map(len, rows.values()))
    _write(file, [list(photos[:columns]), *rows.values()], ["real photos", *rows])


def first_of_prompts(drawn: PromptedPictures) -> dict[str, Image.Image]:
    """The first picture of each of the first prompts, for `write_strip`."""
    firsts: dict[str, Image.Image] = {}
    for picture, prompt in zip(drawn.pictures, drawn.prompts, strict=True):
        if len(firsts) < _MOST_ROWS_OF_STRIP:
            firsts.setdefault(prompt or "", picture)
    return firsts


def write_strip(file: Path, columns: dict[str, dict[str, Image.Image]]) -> None:
    """One picture of each prompt, a column for each adapter, so that one sees how they differ.

    Args:
        columns: label -> prompt -> picture, with the same prompts in all.

    Raises:
        UserError: the file can't be written.
    """
    firsts = list(columns.values())
    prompts = list(firsts[0])
    _write(file, [[first[prompt] for first in firsts] for prompt in prompts], prompts, list(columns))


def _write(
    file: Path, rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str] | None = None
) -> None:
    labels = column_labels or [""] * max(map(len, rows))
    save_png(labelled_grid(rows, row_labels, labels, cell=_CELL), file, {"rows": row_labels})
