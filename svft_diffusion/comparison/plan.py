"""Which rows a comparison needs. It follows from the settings and from the results so far, and from nothing else, so
that any number of processes agree on it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from svft_diffusion.comparison.config import CompareConfig
from svft_diffusion.comparison.methods import Method
from svft_diffusion.comparison.questions import MAIN, OWN_SIZE, REFERENCE, SECOND, Contender, question_with
from svft_diffusion.comparison.rows import Row, Rows
from svft_diffusion.comparison.subjects import ComparedSubject, compared_subjects, search_subjects
from svft_diffusion.errors import UserError
from svft_diffusion.models import EMBEDDED_MODEL, family_of, load_pipeline

SCORE = "quality"
"""What chooses learning rates and the best few."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A contender at the size that its budget pays."""

    contender: Contender
    budget: str
    method: Method
    bytes: int

    @property
    def name(self) -> str:
        return self.contender.name


@dataclass(frozen=True)
class Excluded:
    """Who could not take part, and why."""

    name: str
    budget: str
    reason: str


@dataclass(frozen=True)
class Search:
    """How the learning rate of an entry was, or is being, found.

    Attributes:
        scores: mean score of each rate on the first subjects; None where training diverged.
        rows: all that it needs as far as is known.
        best: the rate, once it is settled.
        final_scores: mean score of the best few rates on all subjects of the search.
    """

    scores: dict[float, float | None]
    rows: list[Row]
    best: float | None
    final_scores: dict[float, float | None] = field(default_factory=dict)

    @property
    def best_at_edge(self) -> bool:
        """Whether a rate that nobody tried may be better."""
        return self.best is not None and len(self.scores) > 1 and self.best in (min(self.scores), max(self.scores))


class Plan:
    """The rows of a comparison.

    Args:
        config: checked.

    Raises:
        UserError: nobody can take part.
    """

    def __init__(self, config: CompareConfig) -> None:
        self.config = config
        self.question = question_with(config.question, config.methods)
        self.subjects = compared_subjects(config.num_subjects)
        self.excluded: list[Excluded] = []
        self._sizes: dict[str, int] = {}  # by description
        self._models = family_of(load_pipeline(EMBEDDED_MODEL)).adapted_models(True)
        self.budgets = {name: self._bytes(method) for name, method in self.question.budgets.items()}
        self.budgets |= {MAIN: config.budget}
        if config.second_budget is not None and config.second_best:
            self.budgets[SECOND] = config.second_budget
        found = [self._entry(contender, contender.budget) for contender in self.question.contenders]
        self.entries = [entry for entry in found if entry is not None]
        if not self.entries:
            raise UserError(f"nobody can take part: {self.excluded[0].name}: {self.excluded[0].reason}")
        # At the second budget, at most everybody who can grow.
        self._smaller: dict[str, Entry] = {}
        if SECOND in self.budgets:
            candidates = [self._entry(entry.contender, SECOND) for entry in self.entries if _grows(entry)]
            self._smaller = {entry.name: entry for entry in candidates if entry is not None}

    def search(self, entry: Entry, rows: Rows) -> Search:
        """The state of the search for an entry's learning rate."""
        config, start = self.config, entry.contender.learning_rate
        if not entry.method.trains:
            return Search({}, [], start)
        factors = list(config.lr_factors)
        if len(factors) == 1:
            return Search({}, [], _rate(start, factors[0]))
        extensions = 0
        while True:
            rates = {factor: _rate(start, factor) for factor in factors}
            tried = {rate: self._rows_of_search(entry, rate, config.search_subjects) for rate in rates.values()}
            scores = {rate: _mean_score(rows, of_rate) for rate, of_rate in tried.items() if rows.have(of_rate)}
            if len(scores) < len(tried):
                return Search(scores, _joined(tried), None)
            worth = {factor: _or_worst(scores[rate]) for factor, rate in rates.items()}
            best = max(factors, key=worth.__getitem__)  # of equals, the smallest
            if extensions == config.lr_extensions or best not in (factors[0], factors[-1]):
                return self._finals(entry, rows, scores, _joined(tried))
            extensions += 1
            if best == factors[-1]:
                factors.append(best * (factors[-1] / factors[-2]))
            else:
                factors.insert(0, best * (factors[0] / factors[1]))

    def _finals(self, entry: Entry, rows: Rows, scores: dict[float, float | None], first: list[Row]) -> Search:
        """A few subjects tell which rates are poor, but not which of the good ones is best: more decide on these."""
        finalists = sorted(scores, key=lambda rate: (-_or_worst(scores[rate]), rate))[: self.config.lr_finalists]
        if len(finalists) == 1:
            return Search(scores, first, finalists[0])
        tried = {rate: self._rows_of_search(entry, rate, self.config.final_search_subjects) for rate in finalists}
        every = list({row.key: row for row in (*first, *_joined(tried))}.values())
        final = {rate: _mean_score(rows, of_rate) for rate, of_rate in tried.items() if rows.have(of_rate)}
        if len(final) < len(tried):
            return Search(scores, every, None, final)
        return Search(scores, every, max(sorted(final), key=lambda rate: _or_worst(final[rate])), final)

    def rows_of(self, entry: Entry, rate: float) -> dict[tuple[ComparedSubject, int], Row]:
        """An entry's rows by subject and seed. The base model is the same with every seed."""
        seeds = range(self.config.num_seeds if entry.method.trains else 1)
        return {
            (subject, seed): self._row(entry.method, rate, subject, seed) for seed in seeds for subject in self.subjects
        }

    def all_rows(self, rows: Rows) -> dict[str, Row]:
        """Every row that is known to be needed, by key."""
        of_search = [row for entry in self.entries for row in self.search(entry, rows).rows]
        compared = [row for entry, rate in self.settled(rows).items() for row in self.rows_of(entry, rate).values()]
        return {row.key: row for row in (*of_search, *compared)}

    def settled(self, rows: Rows) -> dict[Entry, float]:
        """Entries that are known to take part and whose learning rate is known, with it."""
        found = {entry: self.search(entry, rows).best for entry in self.entries}
        rates = {entry: rate for entry, rate in found.items() if rate is not None}
        if len(rates) == len(self.entries):
            for entry in self._best_few(rates, rows):
                rates[self._smaller[entry.name]] = rates[entry]
        return rates

    def missing(self, rows: Rows) -> list[Row]:
        """What can be measured now, in the order in which it should be: a few subjects of all tell more than all of a
        few.
        """
        of_search = [row for entry in self.entries for row in self.search(entry, rows).rows]
        wanted = [self.rows_of(entry, rate) for entry, rate in self.settled(rows).items()]
        places = [(subject, seed) for seed in range(self.config.num_seeds) for subject in self.subjects]
        compared = [by_place[place] for place in places for by_place in wanted if place in by_place]
        distinct = {row.key: row for row in (*of_search, *compared)}
        return [row for row in distinct.values() if rows.find(row) is None]

    def number_of_rows(self) -> int:
        """All of them, if no search goes beyond its edge."""
        config = self.config
        searching = [entry for entry in self.entries if entry.method.trains and len(config.lr_factors) > 1]
        second = min(config.second_best + (REFERENCE in self._smaller), len(self._smaller))
        trained = sum(entry.method.trains for entry in self.entries) + second
        untrained = len(self.entries) - (trained - second)
        finalists = min(config.lr_finalists, len(config.lr_factors))
        of_finals = finalists * (config.final_search_subjects - config.search_subjects) if finalists > 1 else 0
        of_search = len(searching) * (len(config.lr_factors) * config.search_subjects + of_finals)
        return of_search + config.num_subjects * (trained * config.num_seeds + untrained)

    def _best_few(self, rates: Mapping[Entry, float], rows: Rows) -> list[Entry]:
        """Those who grow and did best at the main budget, and `REFERENCE`; nobody before all are measured."""
        if not self._smaller:
            return []
        wanted = {entry: list(self.rows_of(entry, rates[entry]).values()) for entry in self.entries}
        if not all(rows.have(of_entry) for of_entry in wanted.values()):
            return []
        scores = {
            entry: _or_worst(_mean_score(rows, of_entry))
            for entry, of_entry in wanted.items()
            if entry.name in self._smaller
        }
        best = sorted(scores, key=lambda entry: (-scores[entry], entry.name))[: self.config.second_best]
        # Whoever they are, they are compared with the same one.
        return best + [entry for entry in scores if entry.name == REFERENCE and entry not in best]

    def _entry(self, contender: Contender, budget: str) -> Entry | None:
        """The contender at its largest size within a budget."""
        largest: Entry | None = None
        limit = self.budgets.get(budget)
        try:
            for method in contender.ladder:
                size = self._bytes(method)
                if budget != OWN_SIZE and len(contender.ladder) > 1 and limit is not None and size > limit:
                    break
                largest = Entry(contender, budget, method, size)
        except UserError as problem:
            if largest is None:
                self.excluded.append(Excluded(contender.name, budget, str(problem)))
                return None
        if largest is None:
            reason = f"its smallest size takes {self._bytes(contender.ladder[0]):,} of {limit:,} bytes"
            self.excluded.append(Excluded(contender.name, budget, reason))
        return largest

    def _bytes(self, method: Method) -> int:
        key = json.dumps(method.describe(), sort_keys=True)
        if key not in self._sizes:
            self._sizes[key] = method.count_bytes(self._models, self.config.targets)
        return self._sizes[key]

    def _rows_of_search(self, entry: Entry, rate: float, subjects: int) -> list[Row]:
        return [self._row(entry.method, rate, subject, 0) for subject in search_subjects(subjects)]

    def _row(self, method: Method, rate: float, subject: ComparedSubject, seed: int) -> Row:
        return Row(method, rate, self.config.effort, subject, seed)


def _grows(entry: Entry) -> bool:
    return entry.budget == MAIN and len(entry.contender.ladder) > 1


def _rate(start: float, factor: float) -> float:
    """Rounded, so that ways to compute it don't differ."""
    return float(f"{start * factor:.3g}")


def _joined(tried: Mapping[float, list[Row]]) -> list[Row]:
    return [row for of_rate in tried.values() for row in of_rate]


def _mean_score(rows: Rows, wanted: Sequence[Row]) -> float | None:
    """None if one of the rows failed."""
    scores = [result.numbers.get(SCORE) for row in wanted if (result := rows.find(row)) is not None]
    known = [score for score in scores if score is not None]
    return statistics.mean(known) if len(known) == len(scores) else None


def _or_worst(score: float | None) -> float:
    return float("-inf") if score is None else score
