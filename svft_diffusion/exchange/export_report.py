"""What an export holds of an adapter and what it does not, in figures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

AUTO_TOLERANCE = 0.01
"""Relative error that ``rank="auto"`` stays below, over all layers together."""


_MUCH_LOST = 0.1
"""Relative error of the rank from which the LoRA is visibly another adapter."""


@dataclass(frozen=True)
class CarriedLayer:
    """A layer whose update the file holds, up to its rank.

    Attributes:
        layer: canonical name.
        norm: Frobenius norm of the update.
        rank: rank of the update, which the file's rank may be below.
        dropped: Frobenius norm of what the file's rank has no place for.
        rounding: Frobenius norm of what rounding the factors to the file's dtype changes.
    """

    layer: str
    norm: float
    rank: int
    dropped: float
    rounding: float

    @property
    def distance(self) -> float:
        """Frobenius norm of the update less that in the file."""
        return math.hypot(self.dropped, self.rounding)

    @property
    def error(self) -> float:
        """Relative error of the update in the file."""
        return self.distance / self.norm


@dataclass(frozen=True)
class CarriedDifference:
    """A change that the file holds whole: ``part`` (weight, bias) of a layer, its norm, and that of its rounding."""

    layer: str
    part: str
    norm: float
    rounding: float

    @property
    def error(self) -> float:
        """Relative error of the change in the file."""
        return self.rounding / self.norm


@dataclass(frozen=True)
class LeftOut:
    """Something that the format can't hold: ``part`` (weight, bias) of a layer, the norm of its change, and why."""

    layer: str
    part: str
    norm: float
    reason: str


@dataclass(frozen=True)
class ExportReport:
    """What an export holds; norms are Frobenius norms, errors are relative to the norm of the whole.

    Attributes:
        format: the file's format.
        rank: the one rank of all layers in the file; 0 where it holds dense differences alone.
        auto: the rank was chosen by ``rank="auto"``.
        strength: what the adapter was multiplied by.
        dtype: of the file's tensors.
        layers: the layers held as LoRA.
        dense: what is held as dense differences.
        left_out: what the file does not hold.
    """

    format: str
    rank: int
    auto: bool
    strength: float
    dtype: str
    layers: tuple[CarriedLayer, ...]
    dense: tuple[CarriedDifference, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def rank_error(self) -> float:
        """Relative error that the rank alone makes, over all layers held as LoRA."""
        return _ratio((layer.dropped for layer in self.layers), (layer.norm for layer in self.layers))

    @property
    def layer_error(self) -> float:
        """Relative error over all layers held as LoRA, of rank and rounding."""
        return _ratio((layer.distance for layer in self.layers), (layer.norm for layer in self.layers))

    @property
    def dense_error(self) -> float:
        """Relative error of all dense differences, of rounding."""
        return _ratio((held.rounding for held in self.dense), (held.norm for held in self.dense))

    @property
    def rank_cut(self) -> bool:
        """Whether ``rank="auto"`` ended at its limit, with a larger error than it aims at."""
        return self.auto and self.rank_error >= AUTO_TOLERANCE

    @property
    def total_error(self) -> float:
        """Norm of all that the file lacks, relative to all that the adapter changes: weights, biases and norms."""
        left_out = [lost.norm for lost in self.left_out]
        lacking = [*(layer.distance for layer in self.layers), *(held.rounding for held in self.dense), *left_out]
        whole = [*(layer.norm for layer in self.layers), *(held.norm for held in self.dense), *left_out]
        return _ratio(lacking, whole)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            **asdict(self),
            "layers": [{**asdict(layer), "error": layer.error} for layer in self.layers],
            "dense": [{**asdict(held), "error": held.error} for held in self.dense],
            "rank_cut": self.rank_cut,
            "rank_error": self.rank_error,
            "total_error": self.total_error,
        }

    def __str__(self) -> str:
        """The report as a table, a line for each layer and one for each reason why something is left out."""
        lines = []
        if self.layers:
            width = max(len(layer.layer) for layer in self.layers)
            lines.append(f"{'layer':<{width}}  {'norm':>9}  rank  relative error")
            lines += [
                f"{layer.layer:<{width}}  {layer.norm:>9.3g}  {layer.rank:>4}  {layer.error:.2e}"
                for layer in self.layers
            ]
            lines.append(
                f"{len(self.layers)} layers as LoRA of rank {self.rank} in {self.dtype}: "
                f"relative error {self.layer_error:.2e}, by the rank alone {self.rank_error:.2e}"
            )
        if self.dense:
            lines.append(f"{len(self.dense)} dense differences in {self.dtype}: relative error {self.dense_error:.2e}")
        if self.rank_cut:
            lines.append(
                f"rank auto ended at {self.rank}, its limit: the adapter is of higher rank; give a rank, or full"
            )
        elif self.rank_error > _MUCH_LOST:
            lines.append(
                f"warning: rank {self.rank} is too low for this adapter, whose layers are of ranks up to "
                f"{max(layer.rank for layer in self.layers)}: {self.rank_error:.0%} of its update is lost, and "
                "pictures will differ; give a higher rank, auto or full"
            )
        lines += self._lines_of_left_out()
        lines.append(f"relative error in total: {self.total_error:.2e}")
        return "\n".join(lines)

    def _lines_of_left_out(self) -> list[str]:
        groups: dict[tuple[str, str], list[LeftOut]] = {}
        for lost in self.left_out:
            groups.setdefault((lost.part, lost.reason), []).append(lost)
        return [
            f"left out: {part} of {_some(group)}, norm {math.hypot(*(lost.norm for lost in group)):.3g}: {reason}"
            for (part, reason), group in groups.items()
        ]


def _ratio(parts: Iterable[float], whole: Iterable[float]) -> float:
    """Root of the sum of squares of parts, relative to that of the whole; 0 where there is nothing."""
    size = math.hypot(*whole)
    return math.hypot(*parts) / size if size > 0 else 0.0


def _some(group: list[LeftOut]) -> str:
    return group[0].layer if len(group) == 1 else f"{len(group)} layers ({group[0].layer}, ...)"
