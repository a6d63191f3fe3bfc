"""What becomes of a foreign file: an adapter's options and tensors, and what was lost on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from svft_diffusion.errors import UserError

if TYPE_CHECKING:  # the command line asks for the patterns before anything heavy is imported
    from torch import Tensor, nn

    from svft_diffusion.exchange.base_layers import BaseLayer
    from svft_diffusion.exchange.foreign_file import ForeignFile

PATTERNS = ("plain", "banded", "random")
"""Patterns of the core matrix that an update can be projected to; ``random`` holds its largest entries."""
DEFAULT_PATTERN = "random"
DEFAULT_OFF_DIAGONALS = 2


@dataclass(frozen=True)
class ProjectionOptions:
    """Which entries of the core matrix ``U^T dW V`` are kept of an update that needs not lie in the basis."""

    pattern: str | None = None  # one of `PATTERNS`; None leaves it to the format
    off_diagonals: int | None = None


@dataclass(frozen=True)
class ConvertedLayer:
    """What one layer's part in a foreign file became."""

    layer: str  # canonical name
    size: float  # Frobenius norm of the update in the file, at strength 1
    error: float  # of the update in the adapter, relative to that norm


@dataclass(frozen=True)
class Conversion:
    """An adapter made from foreign files."""

    options: dict[str, Any]  # fields of `SpectralConfig`, other than the targets
    tensors: dict[str, Tensor]  # named as in an adapter file, without the sketch
    layers: list[ConvertedLayer]
    left_out: dict[str, str] = field(default_factory=dict)  # what the adapter does not have -> why
    lost: float = 0.0  # Frobenius norm of updates among what was left out

    @property
    def error(self) -> float:
        """Error of all layers together, relative to the norm of all updates in the files."""
        return total_error(self.layers, self.lost)


@dataclass(frozen=True)
class Format:
    """One foreign format: how to tell it, and how to make an adapter of it."""

    title: str
    recognises: Callable[[ForeignFile], bool]
    convert: Callable[[Sequence[ForeignFile], Mapping[str, nn.Module], ProjectionOptions], Conversion]
    projects: bool  # whether `ProjectionOptions` mean something for it


def total_error(layers: Sequence[ConvertedLayer], lost: float) -> float:
    """Relative error over all layers: root of the sum of squares."""
    size = math.hypot(lost, *(layer.size for layer in layers))
    return math.hypot(lost, *(layer.size * layer.error for layer in layers)) / size if size > 0 else 0.0


def converted_layer(layer: BaseLayer, size: float, distance: float) -> ConvertedLayer:
    """Report on a layer whose update of norm ``size`` is off by ``distance``."""
    return ConvertedLayer(layer.canonical, size, distance / size if size > 0 else 0.0)


def chosen_pattern(options: ProjectionOptions, layers: Sequence[BaseLayer]) -> tuple[str, int]:
    """Pattern and off-diagonals of all layers. Left open, as many as the default and the smallest layer allow.

    Raises:
        UserError: they don't go together, or a layer is too small for them.
    """
    pattern, wanted = options.pattern or DEFAULT_PATTERN, options.off_diagonals
    smallest = min(layers, key=lambda layer: min(layer.matrix_shape))
    rank = min(smallest.matrix_shape)
    least = 1 if pattern == "banded" else 0
    if wanted is None:
        wanted = 0 if pattern == "plain" else max(min(DEFAULT_OFF_DIAGONALS, rank - 1), least)
    if pattern == "plain" and wanted != 0:
        raise UserError(f"pattern plain has no off-diagonals, got off_diagonals={wanted}; use pattern banded")
    if not least <= wanted < rank:
        raise UserError(
            f"off_diagonals={wanted} does not fit pattern {pattern}: layer {smallest.canonical} has {rank} singular "
            f"values, so it takes {least} to {rank - 1}"
        )
    return pattern, wanted
