"""What an output folder holds already: pictures that need not be made again, and files that are not ours to replace."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svft_diffusion.errors import UserError
from svft_diffusion.sampling.index_page import CSV_FILE, HTML_FILE, is_index
from svft_diffusion.sampling.plan import PlannedRow
from svft_diffusion.sampling.png import is_damaged_png, read_png_settings

GRID_FILE = "grid.png"
GRID_NAME = re.compile(r"grid(-\d{3,})?\.png")


def finished_pictures(
    output_dir: Path, rows: Sequence[PlannedRow], *, width: int | None, height: int | None, overwrite: bool = False
) -> set[str]:
    """Names of the pictures that are there as they would be made; those missing or damaged are not among them.

    Args:
        width: pixels; None where it is not known yet, like ``height``.
        overwrite: other pictures of these names may be replaced.

    Raises:
        UserError: a picture was made with other settings, or an index or grid is somebody else's; names the first such
            file and the ways out.
    """
    if not output_dir.is_dir():
        return set()
    sizes = {name: size for name, size in (("width", width), ("height", height)) if size is not None}
    finished = set()
    for row in rows:
        for picture in row.pictures:
            file = output_dir / picture.file_name
            if not file.exists() or (file.is_file() and is_damaged_png(file)):
                continue
            if _was_made_with(file, picture.settings | sizes):
                finished.add(picture.file_name)
            elif not overwrite:
                raise UserError(
                    f"{file} is another picture; choose another --output_dir, or replace it with --overwrite"
                )
    if not overwrite:
        _check_overviews(output_dir)
    return finished


def _check_overviews(output_dir: Path) -> None:
    grids = [file for file in output_dir.iterdir() if GRID_NAME.fullmatch(file.name) and not is_damaged_png(file)]
    others = [file for file in grids if not _is_grid(file)]
    indexes = [output_dir / CSV_FILE, output_dir / HTML_FILE]
    others += [file for file in indexes if file.exists() and not is_index(file)]
    if others:
        raise UserError(
            f"{others[0]} was not written by this command; choose another --output_dir, or replace it with --overwrite"
        )


def _is_grid(file: Path) -> bool:
    try:
        return isinstance(read_png_settings(file).get("pictures"), list)
    except UserError:
        return False


def _was_made_with(file: Path, settings: dict[str, Any]) -> bool:
    try:
        found = read_png_settings(file)
    except UserError:
        return False
    return all(found.get(name) == value for name, value in settings.items()) and all(
        name in settings or name not in found for name in ("scheduler_option", "batch_size")
    )
