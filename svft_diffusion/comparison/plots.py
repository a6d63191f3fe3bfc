"""Quality against what it costs, one plot for each cost."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from svft_diffusion.comparison.questions import BASE
from svft_diffusion.comparison.statistics import Line
from svft_diffusion.files.whole_files import replace_when_whole

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
    figure = Figure(figsize=(9, 6), layout="constrained")
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
            elinewidth=0.6,
            markersize=5,
        )
        axes.annotate(
            line.name, (cost, quality.mean), xytext=(4, 3), textcoords="offset points", fontsize=7, color=colour
        )
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(title)
    axes.set_ylabel("quality (95 % intervals over subjects)")
    markers = ", ".join(f"{'circle square diamond triangle wedge'.split()[i % 5]}: {b}" for i, b in enumerate(budgets))
    axes.set_title(f"orange: ours, gray: others; {markers}", fontsize=9)
    axes.grid(alpha=0.3)
    with replace_when_whole(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
    return True
