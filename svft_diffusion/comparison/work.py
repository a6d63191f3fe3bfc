"""A process at work on the rows: it takes one after another that nobody else has, until there are none left."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from svft_diffusion.comparison.measuring import measure, reason_of
from svft_diffusion.comparison.plan import Plan
from svft_diffusion.comparison.rows import BROKEN, FAILED, MEASURED, Result, Row, Rows, code_version
from svft_diffusion.errors import UserError
from svft_diffusion.training.finite import TrainingDiverged
from svft_diffusion.training.many.record import Claims

_SECONDS_BETWEEN_LOOKS = 1.0


class Worker:
    """Measures rows of a plan.

    Args:
        say: told a line after each row.
    """

    def __init__(self, plan: Plan, rows: Rows, say: Callable[[str], None]) -> None:
        self._plan, self._rows, self._say = plan, rows, say
        self._claims = Claims(plan.config.output_dir)

    def work(self) -> bool:
        """Measure until all is measured, also by others, or the time is over; whether all is."""
        hours = self._plan.config.max_hours
        end = None if hours is None else time.monotonic() + 3600 * hours
        while missing := self._plan.missing(self._rows):
            if end is not None and time.monotonic() >= end:
                return False
            if self.measure_first(missing) is None:
                time.sleep(_SECONDS_BETWEEN_LOOKS)  # others are at work on all that can be done now
        return True

    def measure_first(self, missing: list[Row]) -> Result | None:
        """Measure the first row that nobody else works on; None if there is none."""
        for row in missing:
            claim = self._claims.claim(row.key)
            if claim is None:
                continue
            with claim:
                result = self._rows.find(row)  # by another process, a moment ago
                if result is None:
                    result = self._measure(row)
                return result
        return None

    def _measure(self, row: Row) -> Result:
        begun = time.perf_counter()
        folder = self._plan.config.output_dir / "shared"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            measured = measure(row.method, row.learning_rate, row.effort, row.subject, row.seed, folder)
        except Exception as problem:  # of a library, too: the other rows are not its fault
            seconds = round(time.perf_counter() - begun, 2)
            result = Result(_state_after(problem), {}, seconds, code_version(), reason_of(problem))
            self._rows.keep(row, result)
        else:
            seconds = round(time.perf_counter() - begun, 2)
            result = Result(MEASURED, measured.numbers, seconds, code_version())
            self._rows.keep(row, result, measured.pictures)
        said = result.reason or ", ".join(f"{name} {result.numbers[name]}" for name in ("quality", "drift"))
        what = " ".join(str(value) for value in row.method.describe().values())
        self._say(f"{what}, rate {row.learning_rate:g}, {row.subject.name}, seed {row.seed}: {said}")
        return result


def _state_after(problem: Exception) -> str:
    """Whether a row failed for good, by its method, or because of what the system may do better the next time."""
    if isinstance(problem, TrainingDiverged):
        return FAILED
    cause: BaseException | None = problem
    while cause is not None and not isinstance(cause, OSError):  # such as a full disk, which is told as a UserError
        cause = cause.__cause__ or cause.__context__
    return FAILED if isinstance(problem, UserError) and cause is None else BROKEN


def estimate(plan: Plan, rows: Rows, say: Callable[[str], None]) -> str:
    """How many rows are left, and how long they take one process; from rows that are there, or from one made now."""
    missing = plan.missing(rows)
    known = _seconds(plan, rows)
    if missing and not known:
        result = Worker(plan, rows, say).measure_first([row for row in missing if row.method.trains] or missing)
        known = [] if result is None else [result.seconds]
        missing = plan.missing(rows)
    total = plan.number_of_rows()
    done = sum(rows.find(row) is not None for row in plan.all_rows(rows).values())
    left = max(len(missing), total - done)
    if not left:
        return f"all {done} rows are measured"
    if not known:
        return f"{left} of about {total} rows are left; nobody has measured one yet"
    hours = left * statistics.median(known) / 3600
    return (
        f"{left} of about {total} rows are left; at {statistics.median(known):.0f} s each, about {hours:.1f} hours of "
        "one process, and more if searches for learning rates go on beyond their edges"
    )


def _seconds(plan: Plan, rows: Rows) -> list[float]:
    """Of rows in which something was trained."""
    trained = [row for row in plan.all_rows(rows).values() if row.method.trains]
    return [result.seconds for row in trained if (result := rows.find(row)) is not None]
