"""An interference report as a picture: two heat maps, cosine and overlap, of blocks by pairs of adapters."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svft_diffusion.algebra.interference import Interference, Meeting
from svft_diffusion.algebra.interference_report import pair_label
from svft_diffusion.errors import UserError
from svft_diffusion.files.whole_files import check_new_file, replace_when_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_NUMBERED_PAIRS = 6  # beyond, numbers in the cells would not fit
_LONGEST_LABEL = 44


def check_matplotlib() -> None:
    """Raise `UserError` if plots can't be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib; install it with: pip install 'svft-diffusion[plots]'")


def check_plot(file: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise `UserError` if `write_plot` could not write ``file``, or would write over one of ``inputs``."""
    check_matplotlib()
    if file.suffix.lower() != ".png":
        raise UserError(f"the plot {file} must end in .png")
    check_new_file(file, overwrite=overwrite, inputs=inputs)


def write_plot(found: Interference, file: Path, *, overwrite: bool = False) -> Path:
    """Draw the report, whole or not at all.

    Raises:
        UserError: as `check_plot`; or there is only one adapter, or the file can't be written.
    """
    check_plot(file, overwrite=overwrite)
    picture = plot_png(found)
    with replace_when_whole(file) as unfinished:
        unfinished.write_bytes(picture)
    return file


def plot_png(found: Interference) -> bytes:
    """The report as a PNG picture.

    Raises:
        UserError: there is only one adapter, or no matplotlib.
    """
    check_matplotlib()
    if not found.pairs:
        raise UserError("a plot compares adapters, and there is only one")
    from matplotlib.figure import Figure  # the optional extra `plots`; no window and no global state

    places = [*found.blocks, found.total]
    width = max(3.4, 0.75 * len(found.pairs) + 1.0)
    figure = Figure(figsize=(2 * width + 3.6, 0.3 * len(places) + 2.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _heat_map(left, found, "cosine", "cosine: +1 pull alike, -1 undo each other", "RdBu", -1.0)
    _heat_map(right, found, "overlap", "overlap: share of energy on the same entries", "Purples", 0.0)
    left.set_yticks(range(len(places)), [_shortened(place.name) for place in places], fontsize=8)
    weights = ", ".join(found.weights)
    figure.suptitle(_shortened(f"Interference of {weights}", 90), fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150, metadata={"Software": None})
    return picture.getvalue()


def _heat_map(axes: Axes, found: Interference, quantity: str, title: str, colours: str, lowest: float) -> None:
    places = [*found.blocks, found.total]
    cells = [[_number(place.meetings[pair], quantity) for pair in found.pairs] for place in places]
    image = axes.imshow(cells, cmap=colours, vmin=lowest, vmax=1.0, aspect="auto")
    axes.set_facecolor("lightgrey")  # shows where a cell has no number
    axes.set_title(title, fontsize=9)
    labels = [_shortened(pair_label(pair), 28) for pair in found.pairs]
    axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
    axes.axhline(len(found.blocks) - 0.5, color="black", linewidth=1.2)  # the last row is all blocks together
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    if len(found.pairs) <= _MOST_NUMBERED_PAIRS:
        for row, numbers in enumerate(cells):
            for column, number in enumerate(numbers):
                text = "-" if number != number else f"{number:+.2f}" if lowest < 0 else f"{number:.2f}"
                dark = number == number and abs(number) > 0.65
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")


def _number(meeting: Meeting, quantity: str) -> float:
    value: Any = getattr(meeting, quantity)
    return float("nan") if value is None else float(value)


def _shortened(text: str, longest: int = _LONGEST_LABEL) -> str:
    return text if len(text) <= longest else f"…{text[1 - longest :]}"
