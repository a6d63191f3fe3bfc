"""Means over subjects with their intervals, and the differences from one contender, subject by subject."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from svft_diffusion.comparison.plan import SCORE, Entry, Plan
from svft_diffusion.comparison.questions import MAIN, SECOND
from svft_diffusion.comparison.rows import FAILED, MEASURED, Result, Row, Rows
from svft_diffusion.evaluation.intervals import bootstrap_interval

SCORES = ("quality", "subject_similarity", "scene_accuracy", "class_accuracy", "drift", "pixel_drift")
"""Numbers of a row that belong to its subject."""
COSTS = ("values", "file_bytes", "step_seconds", "training_bytes", "effective_rank_change")
"""Numbers that belong to the method; their mean over all rows is told."""


@dataclass(frozen=True)
class Mean:
    """A mean over subjects, and its 95 % bootstrap interval over them."""

    mean: float
    low: float
    high: float
    subjects: int


@dataclass(frozen=True)
class Line:
    """What a comparison says of an entry.

    Attributes:
        scores: by name of the number.
        against: whom it is compared with, at the same budget or else at the main one; empty if that is itself or takes
            no part.
        against_reference: as ``scores``, of the difference from that one, on subjects that both have.
        failed: rows without scores, with a reason for each.
        missing: rows that nobody has measured yet.
    """

    name: str
    budget: str
    ours: bool
    method: dict[str, Any]
    bytes: int
    learning_rate: float
    rates_tried: dict[float, float | None]
    rates_in_finals: dict[float, float | None]
    best_rate_at_edge: bool
    scores: dict[str, Mean]
    costs: dict[str, float]
    against: str
    against_reference: dict[str, Mean]
    failed: list[str]
    missing: int

    def to_mapping(self) -> dict[str, Any]:
        """As JSON holds it."""
        plain = dataclasses.asdict(self)
        for name in ("rates_tried", "rates_in_finals"):
            plain[name] = {f"{rate:g}": score for rate, score in plain[name].items()}
        return plain


def lines_of(plan: Plan, rows: Rows) -> list[Line]:
    """One for each entry with a learning rate, in the order of the question, smaller budgets last."""
    settled = plan.settled(rows)
    by_subject = {entry: _by_subject(entry, rate, plan, rows) for entry, rate in settled.items()}
    return [_line(entry, rate, plan, rows, by_subject) for entry, rate in settled.items()]


def quality_by_effective_rank(plan: Plan, rows: Rows) -> Mean | None:
    """Whether a growing effective rank goes with better pictures: Spearman's rank correlation of the two over the
    entries that tell both, for each subject; None below three of them.
    """
    pairs: dict[int, list[tuple[float, float]]] = {}
    for entry, rate in plan.settled(rows).items():
        of_entry: dict[int, list[tuple[float, float]]] = {}
        for (subject, _), row in plan.rows_of(entry, rate).items():
            numbers = {} if (result := rows.find(row)) is None else result.numbers
            change, quality = numbers.get("effective_rank_change"), numbers.get("quality")
            if change is not None and quality is not None:
                of_entry.setdefault(subject.number, []).append((change, quality))
        for number, of_seeds in of_entry.items():
            changes, qualities = zip(*of_seeds, strict=True)
            pairs.setdefault(number, []).append((statistics.mean(changes), statistics.mean(qualities)))
    found = [_rank_correlation(of_subject) for of_subject in pairs.values() if len(of_subject) >= 3]
    known = [value for value in found if value is not None]
    return _mean(known) if known else None


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    try:
        return statistics.correlation(*(_ranks(values) for values in zip(*pairs, strict=True)))
    except statistics.StatisticsError:  # all the same
        return None


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


def _line(
    entry: Entry, rate: float, plan: Plan, rows: Rows, by_subject: Mapping[Entry, Mapping[str, Mapping[int, float]]]
) -> Line:
    wanted = list(plan.rows_of(entry, rate).values())
    results = [result for row in wanted if (result := rows.find(row)) is not None]
    own, reference = by_subject[entry], _reference(entry, by_subject)
    differences: dict[str, list[float]] = {}
    if reference is own:
        reference = None
    if reference is not None:
        for score in SCORES:
            of_both = own[score].keys() & reference[score].keys()
            differences[score] = [own[score][subject] - reference[score][subject] for subject in sorted(of_both)]
    search = plan.search(entry, rows)
    return Line(
        name=entry.name,
        budget=entry.budget,
        ours=entry.method.family == "spectral",
        method=entry.method.describe(),
        bytes=entry.bytes,
        learning_rate=rate,
        rates_tried=search.scores,
        rates_in_finals=search.final_scores,
        best_rate_at_edge=entry.budget != SECOND and search.best_at_edge,
        scores={score: _mean(list(values.values())) for score, values in own.items() if values},
        costs={cost: mean for cost in COSTS if (mean := _mean_cost(cost, wanted, rows)) is not None},
        against="" if reference is None else entry.contender.against,
        against_reference={score: _mean(values) for score, values in differences.items() if values},
        failed=[result.reason or "" for result in results if result.state != MEASURED],
        missing=len(wanted) - len(results),
    )


def _by_subject(entry: Entry, rate: float, plan: Plan, rows: Rows) -> dict[str, dict[int, float]]:
    """Of each score the mean over seeds, by number of the subject; nothing if no row has scores."""
    values: dict[str, dict[int, list[float]]] = {score: {} for score in SCORES}
    found = {place: result for place, row in plan.rows_of(entry, rate).items() if (result := rows.find(row))}
    if not any(result.state == MEASURED for result in found.values()):
        return {score: {} for score in SCORES}
    for (subject, _), result in found.items():
        for score in SCORES:
            value = _score_of(result, score)
            if value is not None:
                values[score].setdefault(subject.number, []).append(value)
    return {score: {number: statistics.mean(seeds) for number, seeds in of.items()} for score, of in values.items()}


def _score_of(result: Result, score: str) -> float | None:
    """Who fails on a subject has drawn nothing of it. Without that row, its mean would be over easier subjects than
    everybody else's.
    """
    return 0.0 if score == SCORE and result.state == FAILED else result.numbers.get(score)


def _reference(
    entry: Entry, by_subject: Mapping[Entry, Mapping[str, Mapping[int, float]]]
) -> Mapping[str, Mapping[int, float]] | None:
    budgets = (entry.budget, MAIN)
    found = {other.budget: scores for other, scores in by_subject.items() if other.name == entry.contender.against}
    return next((found[budget] for budget in budgets if budget in found), None)


def _mean(values: list[float]) -> Mean:
    low, high = bootstrap_interval(values)
    return Mean(statistics.mean(values), low, high, len(values))


def _mean_cost(cost: str, wanted: list[Row], rows: Rows) -> float | None:
    found = [result.numbers.get(cost) for row in wanted if (result := rows.find(row)) is not None]
    known = [value for value in found if value is not None]
    return statistics.median(known) if known else None
