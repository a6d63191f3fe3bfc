"""Which of several adapters of one subject is the best, by a rule that the report states."""

from __future__ import annotations

from collections.abc import Sequence

from svft_diffusion.evaluation.backbones import Backbone
from svft_diffusion.evaluation.scoring import PROMPT_FIDELITY, SUBJECT_FIDELITY, column_key

BEST_RULE = (
    "the largest product of subject fidelity and prompt fidelity (each no less than 0) on their Pareto front, "
    "and of equal ones the first"
)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The numbers of the points that no other beats: at least as good in both, and better in one."""
    return [
        number
        for number, (x, y) in enumerate(points)
        if not any(other != (x, y) and other[0] >= x and other[1] >= y for other in points)
    ]


def best_of(points: Sequence[tuple[float, float]]) -> int:
    """The number of the best point by `BEST_RULE`."""
    front = pareto_front(points)
    return max(front, key=lambda number: (max(points[number][0], 0.0) * max(points[number][1], 0.0), -number))


def deciding_columns(backbones: Sequence[Backbone]) -> tuple[str, str] | None:
    """The columns of subject and prompt fidelity that decide: by the first backbone that reads no text, if there is
    one, and by the first that does. None without one that reads text.
    """
    reader = next((backbone.name for backbone in backbones if backbone.reads_text), None)
    if reader is None:
        return None
    looker = next((backbone.name for backbone in backbones if not backbone.reads_text), reader)
    return column_key(SUBJECT_FIDELITY, looker), column_key(PROMPT_FIDELITY, reader)
