"""Quality against what it costs, one plot for each cost."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svft_diffusion.comparison.questions import BASE
from svft_diffusion.comparison.statistics import Line
from svft_diffusion.files.whole_files import replace_when_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FONT_SIZE = 7
_OURS, _OTHERS = "#c2410c", "#475569"
# Name of the file -> what stands below, how it is found, and whether its scale is logarithmic
_PLOTS: dict[str, tuple[str, Callable[[Line], float | None], bool]] = {
    "quality_bytes.png": ("stored bytes", lambda line: line.costs.get("file_bytes"), True),
    "quality_time.png": ("seconds of a step", lambda line: line.costs.get("step_seconds"), False),
    "quality_memory.png": ("bytes held while training", lambda line: line.costs.get("training_bytes"), True),
    "quality_drift.png": (
        "drift of class prompts",
        lambda line: line.scores["drift"].mean if "drift" in line.scores else None,
        False,
    ),
}


def draw_plots(lines: list[Line], folder: Path) -> list[str]:
    """Write the plots; their names, none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    return [name for name in _PLOTS if _draw(lines, folder / name)]


def _draw(lines: list[Line], path: Path) -> bool:
    from matplotlib.figure import Figure

    title, cost_of, logarithmic = _PLOTS[path.name]
    points = [
        (line, cost)
        for line in lines
        if "quality" in line.scores and line.name != BASE and (cost := cost_of(line)) is not None
    ]
    if not points:
        return False
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    budgets = list(dict.fromkeys(line.budget for line, _ in points))
    for line, cost in points:
        quality = line.scores["quality"]
        colour = _OURS if line.ours else _OTHERS
        axes.errorbar(
            cost,
            quality.mean,
            yerr=[[max(0.0, quality.mean - quality.low)], [max(0.0, quality.high - quality.mean)]],
            fmt="osD^v"[budgets.index(line.budget) % 5],
            color=colour,
            ecolor=(colour, 0.35),
            elinewidth=1,
            markersize=5,
        )
    if logarithmic:
        axes.set_xscale("log")
    axes.margins(x=0.12)  # room for names at the right edge
    axes.set_xlabel(title)
    axes.set_ylabel("quality (95 % intervals over subjects)")
    markers = ", ".join(f"{'circle square diamond triangle wedge'.split()[i % 5]}: {b}" for i, b in enumerate(budgets))
    axes.set_title(f"orange: ours, gray: others; {markers}", fontsize=9)
    axes.grid(alpha=0.3)
    _name_points(figure, axes, points)
    with replace_when_whole(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi="figure")
    return True


def _name_points(figure: Figure, axes: Axes, points: Sequence[tuple[Line, float]]) -> None:
    """Write each name near its point, where no other name and no point is."""
    figure.draw_without_rendering()  # after which places on the paper are known
    data = [(cost, line.scores["quality"].mean) for line, cost in points]
    at = [axes.transData.transform(point) for point in data]
    size = figure.dpi * _FONT_SIZE / 72
    places = free_places([(x, y) for x, y in at], [0.62 * size * len(line.name) for line, _ in points], 1.2 * size)
    for (line, _), point, (_, y), place in zip(points, data, at, places, strict=True):
        colour = _OURS if line.ours else _OTHERS
        far = abs(place[1] - y) > 2 * size
        axes.annotate(
            line.name,
            point,
            xytext=place,
            textcoords="figure pixels",
            fontsize=_FONT_SIZE,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4} if far else None,
        )


def free_places(
    points: Sequence[tuple[float, float]], widths: Sequence[float], height: float
) -> list[tuple[float, float]]:
    """Lower left corners of boxes beside points, each as near to its own as the earlier boxes and all points allow.

    Args:
        points: x and y of each.
        widths: of the boxes, in the same unit; all have the same ``height``.
    """
    gap = 0.5 * height
    taken = [(x - gap, y - gap, x + gap, y + gap) for x, y in points]
    places = []
    for (x, y), width in zip(points, widths, strict=True):
        shifts = sorted((0.5 * height * k for k in range(-30, 31)), key=abs)
        offered = [(left, y - 0.4 * height + shift) for shift in shifts for left in (x + gap, x - gap - width)]
        free = (
            (left, low)
            for left, low in offered
            if not any(
                left < right and other < left + width and low < high and lowest < low + height
                for other, lowest, right, high in taken
            )
        )
        place = next(free, offered[0])
        taken.append((*place, place[0] + width, place[1] + height))
        places.append(place)
    return places
