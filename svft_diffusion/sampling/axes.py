"""Axes of a grid of pictures: what is typed for one, as values, and what a cell is drawn with."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from svft_diffusion.errors import UserError
from svft_diffusion.sampling.schedulers import scheduler_name

MOST_CELLS = 36
"""Of a grid that somebody waits for."""

WEIGHT, PROMPT, REPLACE = "weight", "prompt", "replace"
SEED, STEPS, GUIDANCE, SCHEDULER = "seed", "num_inference_steps", "guidance_scale", "scheduler"
_WHOLE = (SEED, STEPS)
_NUMBERS = (WEIGHT, SEED, STEPS, GUIDANCE)
_SHORT = {SEED: "seed", STEPS: "steps", GUIDANCE: "guidance"}
_LONGEST_QUOTED = 60

Value = str | int | float


@dataclass(frozen=True)
class Axis:
    """The values along one side of a grid.

    Attributes:
        kind: ``weight``, ``prompt``, ``replace``, ``seed``, ``num_inference_steps``, ``guidance_scale`` or
            ``scheduler``.
        values: weights, prompts, words in place of ``of``, seeds and so on.
        of: the adapter whose weight it is, or the words that are replaced.
        name: what labels call that adapter.
    """

    kind: str
    values: tuple[Value, ...]
    of: str = ""
    name: str = ""

    @property
    def labels(self) -> list[str]:
        """One for each value."""
        if self.kind in (PROMPT, SCHEDULER, REPLACE):
            return [str(value) for value in self.values]
        name = self.name if self.kind == WEIGHT else _SHORT[self.kind]
        return [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for value in self.values]


@dataclass(frozen=True)
class Cell:
    """A place in a grid, and what is different there.

    Attributes:
        settings: ``prompt``, ``seed``, ``num_inference_steps``, ``guidance_scale`` and ``scheduler``, as far as an
            axis sets them.
        weights: adapter -> weight, of those on an axis.
    """

    row: int
    column: int
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)


def parse_axis(kind: str, text: str, *, of: str = "", name: str = "") -> Axis:
    """An axis from what is typed: numbers and ranges such as ``0, 0.5, 1`` or ``0:1:0.25``; prompts one a line; names
    of schedulers, or words to replace each other, between commas (quoted, where they hold some).

    Of words to replace, the first are looked for in the prompt, and are the first value.

    Raises:
        UserError: no value, one that is none of its kind, or more than `MOST_CELLS`.
    """
    values: Sequence[Value]
    if kind in _NUMBERS:
        values = whole_numbers_in(text) if kind in _WHOLE else numbers_in(text)
    elif kind == PROMPT:
        values = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        values = _words_in(text)
        if kind == SCHEDULER:
            values = [scheduler_name(word) for word in values]
        elif len(values) < 2:
            raise UserError("to replace words, give those of the prompt first, then others: red, blue, green")
        else:
            of = str(values[0])
    values = list(dict.fromkeys(values))
    if not values:
        raise UserError("an axis has no values; write some, such as 0, 0.5, 1")
    _check_count(len(values))
    return Axis(kind, tuple(values), of, name)


def numbers_in(text: str) -> list[float]:
    """The numbers that are typed: ``0, 0.5, 1`` or ``0:1:0.25``, which is 0, 0.25, 0.5, 0.75, 1; or both, mixed.

    Raises:
        UserError: something else, or more than `MOST_CELLS`.
    """
    return [float(number) + 0.0 for number in _decimals_in(text)]  # adding zero turns a negative zero into zero


def whole_numbers_in(text: str) -> list[int]:
    """`numbers_in` for whole numbers.

    Raises:
        UserError: as there, or a number with a fraction.
    """
    numbers = _decimals_in(text)
    for number in numbers:
        if number != number.to_integral_value():
            raise UserError(f"{number} is no whole number")
    return [int(number) for number in numbers]


def cells_of(axes: Sequence[Axis], prompt: str) -> list[Cell]:
    """The cells of a grid row by row: the first axis goes across, the second, if there is one, down.

    Whole prompts are put in before words in them are replaced, whatever the order of the axes.

    Raises:
        UserError: more than `MOST_CELLS`, two axes of the same kind, or words that no prompt holds.
    """
    across, *others = axes
    down = others[0] if others else None
    _check_count(len(across.values) * (len(down.values) if down else 1))
    if down is not None and (across.kind, across.of) == (down.kind, down.of):
        raise UserError("both axes are the same; choose another one for the rows")
    cells = []
    for row, below in enumerate(down.values if down else [None]):
        for column, value in enumerate(across.values):
            chosen = [(across, value)] + ([(down, below)] if down is not None and below is not None else [])
            label = ", ".join(axis.labels[axis.values.index(one)] for axis, one in chosen)
            cells.append(_cell(row, column, label, chosen, prompt))
    return cells


def _cell(row: int, column: int, label: str, chosen: Sequence[tuple[Axis, Value]], prompt: str) -> Cell:
    settings: dict[str, Any] = {}
    weights: dict[str, float] = {}
    for axis, value in sorted(chosen, key=lambda one: one[0].kind == REPLACE):
        if axis.kind == WEIGHT:
            weights[axis.of] = float(value)
        elif axis.kind == REPLACE:
            text = settings.get(PROMPT, prompt)
            if axis.of not in text:
                raise UserError(f"the prompt {_quoted(text)} does not hold {_quoted(axis.of)}, which is to be replaced")
            settings[PROMPT] = text.replace(axis.of, str(value))
        else:
            settings[axis.kind] = value
    return Cell(row, column, label, settings, weights)


def _decimals_in(text: str) -> list[Decimal]:
    numbers: list[Decimal] = []
    for part in text.replace("\n", ",").split(","):
        if part.strip():
            numbers += _expanded(part)
            _check_count(len(numbers))
    return numbers


def _expanded(part: str) -> list[Decimal]:
    """One number, or those of a range ``first:last`` or ``first:last:step``, its ends included."""
    numbers = [_number(one, part) for one in part.split(":")]
    if len(numbers) == 1:
        return numbers
    if len(numbers) > 3:
        raise UserError(f"{_quoted(part.strip())} is no range; write first:last:step, such as 0:1:0.25")
    first, last = numbers[:2]
    step = numbers[2] if len(numbers) == 3 else Decimal(1 if last >= first else -1)
    if step == 0:
        raise UserError(f"the range {_quoted(part.strip())} never gets to its end; its step must not be 0")
    if (last - first) * step < 0:
        raise UserError(f"the range {_quoted(part.strip())} never gets to its end; change the sign of its step")
    # Exact: 0:1:0.1 ends at 1 and holds 0.3.
    steps = (last - first) / step
    count = math.floor(steps) + 1 if steps < MOST_CELLS else MOST_CELLS + 1
    _check_count(count)
    return [first + number * step for number in range(count)]


def _number(text: str, part: str) -> Decimal:
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or abs(number) > 2**63 or number.as_tuple().exponent < -18:  # type: ignore[operator]
        raise UserError(f"{_quoted(part.strip())} is neither a number nor a range such as 0:1:0.25")
    return number


def _words_in(text: str) -> list[str]:
    try:
        rows = list(csv.reader(text.splitlines(), skipinitialspace=True, strict=True))
    except csv.Error:
        raise UserError('a quote is not closed; write "red, white", blue') from None
    return [word.strip() for row in rows for word in row if word.strip()]


def _check_count(count: int) -> None:
    if count > MOST_CELLS:
        raise UserError(f"this makes more than {MOST_CELLS} pictures, the most of a grid; take fewer values")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_QUOTED else f"{text[: _LONGEST_QUOTED - 3]}...")
