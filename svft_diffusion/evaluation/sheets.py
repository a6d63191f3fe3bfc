"""Contact sheets: what was scored, beside the real photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from svft_diffusion.evaluation.scoring import PromptedPictures
from svft_diffusion.sampling.grid import labelled_grid
from svft_diffusion.sampling.png import save_png

_MOST_ROWS_OF_STRIP = 8
_MOST_COLUMNS, _MOST_ROWS = 12, 100  # of a sheet
_CELL = 160  # pixels


def write_sheet(file: Path, drawn: PromptedPictures, photos: Sequence[Image.Image]) -> None:
    """A row of real photos, as many as a prompt has pictures, and below them rows for each prompt, at most 100 in all.

    Raises:
        UserError: the file can't be written.
    """
    by_prompt: dict[str, list[Image.Image]] = {}
    for picture, prompt in zip(drawn.pictures, drawn.prompts, strict=True):
        by_prompt.setdefault(prompt or "", []).append(picture)
    rows, labels = [], []
    for prompt, pictures in by_prompt.items():
        for start in range(0, len(pictures), _MOST_COLUMNS):
            rows.append(pictures[start : start + _MOST_COLUMNS])
            labels.append("" if start else prompt)
    left_out = sum(map(len, rows[_MOST_ROWS:]))
    if left_out:
        rows, labels = (
            rows[:_MOST_ROWS],
            [*labels[: _MOST_ROWS - 1], f"{labels[_MOST_ROWS - 1]} (and {left_out} more pictures)"],
        )
    columns = max(map(len, rows))
    _write(file, [list(photos[:columns]), *rows], ["real photos", *labels])


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
