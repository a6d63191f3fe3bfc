"""The plots of an evaluation, by matplotlib (the optional extra `plots`)."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svft_diffusion.evaluation.report import EvaluationReport, ScoredRow
from svft_diffusion.evaluation.scoring import FEATURE_DRIFT, SUBJECT_FIDELITY, column_key
from svft_diffusion.evaluation.selection import pareto_front
from svft_diffusion.files.whole_files import replace_when_whole

_WIDTH_OF_LETTER, _HEIGHT_OF_NAME = 5.0, 9.0  # points, about, of the names beside points
PLOT_MISSING = "no plot: it needs matplotlib (pip install 'svft-diffusion[plots]')"


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_pareto(report: EvaluationReport, subject: str, file: Path) -> bool:
    """Subject fidelity against prompt fidelity, and against drift, of all rows of a subject; whether it was drawn.

    Nothing is drawn without matplotlib, or where no backbone reads text.

    Raises:
        UserError: the file can't be written.
    """
    rows = [row for row in report.rows if row.subject == subject]
    if not can_plot() or report.deciding is None:
        return False
    from matplotlib.figure import Figure  # no window and no global state

    fidelity, prompt = report.deciding
    rows = [row for row in rows if row.scores.get(fidelity) is not None and row.scores.get(prompt) is not None]
    drift = column_key(FEATURE_DRIFT, fidelity.partition(":")[2])
    has_drift = all(row.scores.get(drift) is not None for row in rows)
    figure = Figure(figsize=(11.0 if has_drift else 6.0, 5.0), layout="constrained")
    axes = figure.subplots(1, 2 if has_drift else 1, squeeze=False)[0]
    best = report.best.get(subject)
    _draw_panel(axes[0], report, rows, prompt, fidelity, best=best, more_is_better=True)
    for text in axes[0].legend(loc="best").get_texts():
        text.set_parse_math(False)  # a dollar sign in a file's name
    if has_drift:
        _draw_panel(axes[1], report, rows, drift, fidelity, best=best, more_is_better=False)
    _mark_photos(axes, report, subject, fidelity)
    figure.draw_without_rendering()  # so that the places of points are known
    _label_points(axes[0], rows, prompt, fidelity, best)
    if has_drift:
        _label_points(axes[1], rows, drift, fidelity, best)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    with replace_when_whole(file) as unfinished:
        unfinished.write_bytes(picture.getvalue())
    return True


def _draw_panel(
    axis: Any,
    report: EvaluationReport,
    rows: Sequence[ScoredRow],
    across: str,
    up: str,
    *,
    best: str | None,
    more_is_better: bool,
) -> None:
    points = [(row.scores[across] or 0.0, row.scores[up] or 0.0) for row in rows]
    signed = points if more_is_better else [(-x, y) for x, y in points]
    front = sorted(points[number] for number in pareto_front(signed))
    axis.plot([x for x, _ in front], [y for _, y in front], color="lightsteelblue", zorder=1, label="Pareto front")
    axis.scatter([x for x, _ in points], [y for _, y in points], color="tab:blue", s=28, zorder=2)
    for row, (x, y) in zip(rows, points, strict=True):
        if row.label == best:
            axis.scatter([x], [y], color="tab:orange", marker="*", s=220, zorder=3, label=f"best: {row.label}")
    axis.margins(0.15)
    direction = "more is better" if more_is_better else "less is better"
    axis.set_xlabel(f"{report.titles[across]}, {direction}", parse_math=False)
    axis.set_ylabel(report.titles[up], parse_math=False)
    axis.grid(alpha=0.3)


def _label_points(axis: Any, rows: Sequence[ScoredRow], across: str, up: str, best: str | None) -> None:
    """Names beside the points, from the top down; one that would cover another moves below it."""
    points_of_inch, dots_of_inch = 72.0, axis.figure.dpi
    taken: list[tuple[float, float, float]] = []  # left end, right end and height of each name, in points
    for row in sorted(rows, key=lambda row: -(row.scores[up] or 0.0)):
        point = (row.scores[across] or 0.0, row.scores[up] or 0.0)
        left, height = axis.transData.transform(point) * points_of_inch / dots_of_inch
        right_border = axis.bbox.x1 * points_of_inch / dots_of_inch
        width = _WIDTH_OF_LETTER * len(row.label)
        shift = 7.0 if left + 7.0 + width < right_border else -7.0 - width
        start, lower = left + shift, 0.0
        while any(
            start < other_end and other_start < start + width and abs(height - lower - other) < _HEIGHT_OF_NAME
            for other_start, other_end, other in taken
        ):
            lower += 1.0
        taken.append((start, start + width, height - lower))
        axis.annotate(
            row.label, point, textcoords="offset points", xytext=(shift, -3.0 - lower), fontsize=8,
            fontweight="bold" if row.label == best else "normal", parse_math=False,
            arrowprops={"arrowstyle": "-", "color": "gray", "linewidth": 0.5} if lower > _HEIGHT_OF_NAME else None,
        ).set_in_layout(False)  # fmt: skip


def _mark_photos(axes: Sequence[Any], report: EvaluationReport, subject: str, fidelity: str) -> None:
    """A line at the fidelity of the photos to each other."""
    facts = next(facts for facts in report.subjects if facts.name == subject)
    ceiling = facts.photo_scores.get(fidelity)
    if ceiling is None or not fidelity.startswith(SUBJECT_FIDELITY):
        return
    for axis in axes:
        axis.axhline(ceiling, color="gray", linestyle="--", linewidth=1)
        axis.annotate(
            "real photos", (0.01, ceiling), xycoords=("axes fraction", "data"), textcoords="offset points",
            xytext=(0, -9), fontsize=8, color="gray",
        )  # fmt: skip
