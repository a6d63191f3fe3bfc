"""What an output folder holds already: pictures that need not be made again, and files that are not ours to replace."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svft_diffusion.errors import UserError
from svft_diffusion.sampling.index_page import CSV_FILE, HTML_FILE, pictures_of_index
from svft_diffusion.sampling.plan import SETTINGS_OF_FEW, PlannedRow
from svft_diffusion.sampling.png import is_damaged_png, read_png_settings
from svft_diffusion.terminal import printable

GRID_FILE = "grid.png"
_WAYS_OUT = "choose another --output_dir, or replace it with --overwrite"
GRID_NAME = re.compile(r"grid(-\d{3,})?\.png")


def finished_pictures(
    output_dir: Path,
    rows: Sequence[PlannedRow],
    *,
    width: int | None,
    height: int | None,
    overwrite: bool = False,
    disable_safety_checker: bool = False,
) -> dict[str, tuple[int, int]]:
    """Width and height of each picture that is there as it would be made; those missing or damaged are not among them.

    Args:
        width: pixels; None where it is not known yet, like ``height``.
        overwrite: other pictures of these names may be replaced, and grids and indexes of others.
        disable_safety_checker: pictures that a safety checker has blacked out shall be made again.

    Raises:
        UserError: a picture was made with other settings, or an index or grid is somebody else's or shows other
            pictures; names the first such file and the ways out.
    """
    if not output_dir.is_dir():
        return {}
    sizes = {name: size for name, size in (("width", width), ("height", height)) if size is not None}
    finished = {}
    for row in rows:
        for picture in row.pictures:
            file = output_dir / picture.file_name
            if not file.exists() or (file.is_file() and is_damaged_png(file)):
                continue
            found = _settings_of(file)
            if _are_those(found, picture.settings | sizes):
                if not (disable_safety_checker and found.get("blacked_out")):
                    finished[picture.file_name] = found["width"], found["height"]
            elif not overwrite:
                raise UserError(f"{file} is another picture; {_WAYS_OUT}")
    if not overwrite:
        _check_overviews(output_dir, {picture.file_name for row in rows for picture in row.pictures})
    return finished


def pictures_of_grid(file: Path) -> set[str] | None:
    """Names of the pictures that a grid of this command shows; None for a file of somebody else."""
    shown = _settings_of(file).get("pictures")
    return {str(name) for name in shown} if isinstance(shown, list) else None


def _check_overviews(output_dir: Path, planned: set[str]) -> None:
    """Raise `UserError` if a grid or an index would be lost that shows more than the ``planned`` pictures."""
    for file in sorted(output_dir.iterdir()):
        if GRID_NAME.fullmatch(file.name) and not is_damaged_png(file):
            shown = pictures_of_grid(file)
        elif file.name in (CSV_FILE, HTML_FILE):
            shown = pictures_of_index(file)
        else:
            continue
        if shown is None:
            raise UserError(f"{file} was not written by this command; {_WAYS_OUT}")
        if others := shown - planned:
            raise UserError(f"{file} shows pictures of another run, such as {printable(min(others), 100)}; {_WAYS_OUT}")


def _settings_of(file: Path) -> dict[str, Any]:
    try:
        return read_png_settings(file)
    except UserError:
        return {}


def _are_those(found: dict[str, Any], settings: dict[str, Any]) -> bool:
    return (
        all(found.get(name) == value for name, value in settings.items())
        and all(name in settings or name not in found for name in SETTINGS_OF_FEW)
        and "width" in found
        and "height" in found
    )
