"""What a measurement gives, and the bars it is held against."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.adapters.timing import median_ratio


@dataclass(frozen=True)
class Result:
    """One contender in one case.

    Attributes:
        section, case, contender: what was measured.
        seconds: time of one step (or call) in every round, in the order of the rounds.
        memory: bytes by kind: ``saved`` for backward, ``peak`` of a step, ``held`` between steps beyond the base.
        figures: other numbers by name.
    """

    section: str
    case: str
    contender: str
    seconds: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bar:
    """A limit on one contender's figure, alone or as a ratio to a reference in the same case.

    Attributes:
        quantity: ``seconds``; ``extra saved``, bytes saved beyond the frozen base; or the name of a figure.
        limit: the figure must not be greater.
        at_least: nor smaller than this, where there is such a bound.
        reference: contender to compare with; None for the figure itself.
    """

    section: str
    case: str
    contender: str
    limit: float
    reference: str | None = None
    quantity: str = "seconds"
    at_least: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A bar beside what was measured."""

    bar: Bar
    measured: float

    @property
    def holds(self) -> bool:
        """Whether the measured figure lies within the bar."""
        return self.measured <= self.bar.limit and (self.bar.at_least is None or self.measured >= self.bar.at_least)


def find(results: Iterable[Result], section: str, case: str, contender: str) -> Result | None:
    """The result of a contender in a case, or None."""
    for result in results:
        if (result.section, result.case, result.contender) == (section, case, contender):
            return result
    return None


def verdicts(results: Sequence[Result], bars: Iterable[Bar], floor: str) -> list[Verdict]:
    """The bars whose contenders were measured. ``floor`` is the contender whose saved bytes everybody has."""
    found = []
    for bar in bars:
        own = find(results, bar.section, bar.case, bar.contender)
        base = find(results, bar.section, bar.case, floor)
        other = None if bar.reference is None else find(results, bar.section, bar.case, bar.reference)
        if own is None or (bar.reference is not None and other is None):
            continue
        if bar.quantity == "seconds":
            measured = median_ratio(own.seconds, other.seconds) if other else statistics.median(own.seconds)
        elif bar.quantity == "extra saved":
            if base is None or other is None:
                continue
            measured = extra_saved(own, base) / extra_saved(other, base)
        else:
            measured = own.figures[bar.quantity] / (other.figures[bar.quantity] if other else 1.0)
        found.append(Verdict(bar, measured))
    return found


def extra_saved(result: Result, floor: Result) -> int:
    """Bytes saved for backward beyond those that the frozen base saves."""
    return result.memory["saved"] - floor.memory["saved"]
