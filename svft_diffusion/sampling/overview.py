"""All pictures of a run at a glance: labelled grids, and the index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from svft_diffusion.sampling.folder import GRID_FILE, GRID_NAME, pictures_of_grid
from svft_diffusion.sampling.grid import LARGEST_DEFAULT_CELL, labelled_grid
from svft_diffusion.sampling.index_page import write_index
from svft_diffusion.sampling.plan import PlannedRow
from svft_diffusion.sampling.png import read_png, save_png

_PICTURES_OF_GRID = 100  # as many are in memory at a time


class Overview(NamedTuple):
    """Files that show or list a run's pictures."""

    grids: list[Path]
    page: Path  # index.html
    blacked_out: list[Path]  # of the pictures, those that the base model's safety checker has hidden


def write_overview(output_dir: Path, rows: Sequence[PlannedRow]) -> Overview:
    """Write the grids and the index of pictures that are all there; other grids of this command go.

    Raises:
        UserError: a picture is gone, or the folder can't be written to.
    """
    pages = list(_pages(rows))
    listed: list[tuple[str, Mapping[str, Any]]] = []
    grids = []
    for number, page in enumerate(pages, 1):
        pictures: list[list[Image.Image | None]] = []
        for row in page:
            read = [read_png(output_dir / picture.file_name) for picture in row.pictures]
            listed += [(picture.file_name, told) for picture, (_, told) in zip(row.pictures, read, strict=True)]
            pictures.append([_small(image) for image, _ in read])
        names = [picture.file_name for row in page for picture in row.pictures]
        grid = labelled_grid(pictures, [row.label for row in page], _column_labels(page))
        name = GRID_FILE if len(pages) == 1 else f"grid-{number:03d}.png"
        grids.append(save_png(grid, output_dir / name, {"pictures": names}))
    for file in output_dir.iterdir():
        if GRID_NAME.fullmatch(file.name) and file not in grids and pictures_of_grid(file) is not None:
            file.unlink()
    blacked_out = [output_dir / name for name, told in listed if told.get("blacked_out")]
    return Overview(grids, write_index(output_dir, listed), blacked_out)


def save_sheet(
    file: Path, rows: Sequence[Sequence[Path | None]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Path:
    """Write a labelled grid of pictures that are there; its settings name them.

    Raises:
        UserError: a picture is gone, or the file can't be written.
    """
    pictures = [[None if path is None else _small(read_png(path)[0]) for path in row] for row in rows]
    names = [path.name for row in rows for path in row if path is not None]
    return save_png(labelled_grid(pictures, row_labels, column_labels), file, {"pictures": names})


def _pages(rows: Sequence[PlannedRow]) -> Iterator[list[PlannedRow]]:
    """Rows in groups of not much more than `_PICTURES_OF_GRID` pictures."""
    page: list[PlannedRow] = []
    for row in rows:
        if page and sum(len(other.pictures) for other in [*page, row]) > _PICTURES_OF_GRID:
            yield page
            page = []
        page.append(row)
    yield page


def _column_labels(rows: Sequence[PlannedRow]) -> list[str]:
    """The seeds, where all rows that reach a column have the same in it."""
    labels = []
    for column in range(max(len(row.pictures) for row in rows)):
        seeds = {row.pictures[column].seed for row in rows if column < len(row.pictures)}
        labels.append(f"seed {min(seeds)}" if len(seeds) == 1 else f"picture {column + 1}")
    return labels


def _small(image: Image.Image) -> Image.Image:
    """The picture as large as a grid shows it at most."""
    image.thumbnail((LARGEST_DEFAULT_CELL, image.height), Image.Resampling.LANCZOS)
    return image
