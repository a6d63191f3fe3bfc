"""How strongly an adapter acts from the first denoising step to the last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from svft_diffusion.errors import UserError

_FORMS = "{ramp_in: 0.3}, {ramp_out: 0.3}, {from: 0.4}, {until: 0.6} or points such as 0:0 0.3:1"


@dataclass(frozen=True)
class StepSchedule:
    """A factor of the adapter's weight, linear between points and constant beyond them.

    Each point is (part of the denoising that is done, factor): 0 is the first step, 1 the last. Two points at the same
    part make a jump, behind which the second counts. Image to image runs the later steps alone, and begins at
    the part where they do. The text encoder speaks before the first step: its part of an adapter has no schedule.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        numbers = [number for point in self.points for number in point]
        parts = [part for part, _ in self.points]
        if not parts or not all(map(math.isfinite, numbers)) or min(parts) < 0 or max(parts) > 1:
            raise UserError(f"a schedule has points from 0 (first step) to 1 (last), such as 0:0 0.3:1; got {self}")
        if parts != sorted(parts):
            raise UserError(f"the points of a schedule come in the order of the steps; got {self}")

    def __str__(self) -> str:
        """The points as `parse_schedule` reads them."""
        return " ".join(f"{part!r}:{factor!r}" for part, factor in self.points)

    def factor(self, done: float) -> float:
        """The factor when the part ``done`` of the denoising, from 0 to 1, is done."""
        if done < self.points[0][0]:
            return self.points[0][1]
        for (part, factor), (next_part, next_factor) in pairwise(self.points):
            if part <= done < next_part:
                return factor + (next_factor - factor) * (done - part) / (next_part - part)
        return self.points[-1][1]


def parse_schedule(value: object) -> StepSchedule:
    """A schedule from text or from what YAML and JSON hold.

    ``0:0 0.3:1`` and ``[[0, 0], [0.3, 1]]`` are points; ``{"ramp_in": 0.3}`` rises from 0 to 1 in the first 30 % of the
    steps, ``{"ramp_out": 0.3}`` falls in the last 30 %, ``{"from": 0.4}`` acts after 40 % only, ``{"until": 0.6}``
    before 60 % only.

    Raises:
        UserError: anything else.
    """
    if isinstance(value, str):
        return StepSchedule(tuple(_point(point.split(":"), value) for point in value.replace(",", " ").split()))
    if isinstance(value, Mapping) and len(value) == 1:
        [(form, part)] = value.items()
        number = _number(part, value)
        points = {
            "ramp_in": ((0.0, 0.0), (number, 1.0)),
            "ramp_out": ((1.0 - number, 1.0), (1.0, 0.0))[: 2 if number else 1],
            "from": ((0.0, 0.0), (number, 0.0), (number, 1.0)),
            "until": ((0.0, 1.0), (number, 1.0), (number, 0.0))[: 3 if number < 1 else 2],
        }.get(form)
        if points is not None:
            return StepSchedule(points)
    if isinstance(value, Sequence):
        return StepSchedule(tuple(_point(point, value) for point in value))
    raise UserError(f"{value!r} is no schedule; write {_FORMS}")


def part_done(timesteps: Tensor, timestep: float) -> float:
    """Which part of the denoising is done in the step at ``timestep``.

    Args:
        timesteps: (n,) those of the scheduler. Ones that look at a step twice, as Heun's does, list it twice; it is
            one part of the denoising. Inversion lists them backwards.
        timestep: one of them, or close to one where the denoiser is told a rounded one.
    """
    distinct = timesteps.cpu().double().unique().flip(0)  # on the CPU: not every device has float64
    return float((distinct - timestep).abs().argmin()) / max(len(distinct) - 1, 1)


def _point(point: object, schedule: object) -> tuple[float, float]:
    if not isinstance(point, Sequence) or isinstance(point, str) or len(point) != 2:
        raise UserError(f"{schedule!r} is no schedule; write {_FORMS}")
    return _number(point[0], schedule), _number(point[1], schedule)


def _number(value: object, schedule: object) -> float:
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise UserError(f"{schedule!r} is no schedule: {value!r} is not a number; write {_FORMS}")
