"""The methods, one row each: which values a layer trains and which core matrix they make.

A new method is a module in `svft_diffusion.spectral` with its formulas, a class here and a row in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from svft_diffusion.errors import UserError
from svft_diffusion.spectral import banded_core, number_of_banded_positions, spectral_shift, sum_of_cores


@dataclass(frozen=True)
class LayerOptions:
    """What an adapter's method needs to know about one layer."""

    method: str
    pattern: str
    off_diagonals: int
    rank: int  # leading singular triplets of this layer that train


@dataclass(frozen=True)
class Term:
    """One adapter's part in a layer."""

    values: Tensor  # 1-D, float32
    strength: float
    options: LayerOptions


class Method(Protocol):
    """What a method has to answer."""

    def check(self, pattern: str, off_diagonals: int) -> None:
        """Raise `UserError` for options that the method does not have."""

    def number_of_values(self, options: LayerOptions) -> int:
        """Trained values in a layer. Raises ValueError where the options don't fit the layer."""

    def core(self, sigma: Tensor, terms: Sequence[Term]) -> Tensor:
        """Core (r, 2d+1) that all adapters of this method make together in a layer (see `spectral.core`)."""


class SVFT:
    """Core matrices of several adapters add up, each times its strength."""

    patterns = ("plain", "banded")

    def check(self, pattern: str, off_diagonals: int) -> None:
        _check_pattern("svft", pattern, self.patterns)
        if pattern == "plain" and off_diagonals != 0:
            raise UserError(f"pattern plain has no off-diagonals, got {off_diagonals}; use pattern banded")
        if pattern == "banded" and off_diagonals < 1:
            raise UserError(f"pattern banded needs off_diagonals of at least 1, got {off_diagonals}; 2 is a good start")

    def number_of_values(self, options: LayerOptions) -> int:
        if options.off_diagonals >= options.rank:
            raise ValueError(
                f"off_diagonals={options.off_diagonals} is too large for {options.rank} singular values: "
                f"use at most {options.rank - 1}"
            )
        return number_of_banded_positions(options.rank, options.off_diagonals)

    def core(self, sigma: Tensor, terms: Sequence[Term]) -> Tensor:
        return sum_of_cores(
            [term.strength * banded_core(term.values, term.options.rank, term.options.off_diagonals) for term in terms]
        )


class SVDiff:
    """Shifts of several adapters add up inside the relu (SVDiff, Eq. 4)."""

    patterns = ("plain",)

    def check(self, pattern: str, off_diagonals: int) -> None:
        _check_pattern("svdiff", pattern, self.patterns)
        if off_diagonals != 0:
            raise UserError(f"svdiff has no off-diagonals, got off_diagonals={off_diagonals}; use method svft")

    def number_of_values(self, options: LayerOptions) -> int:
        return options.rank

    def core(self, sigma: Tensor, terms: Sequence[Term]) -> Tensor:
        shift = spectral_shift(sigma, [term.values for term in terms], [term.strength for term in terms])
        return shift[:, None]


METHODS: dict[str, Method] = {"svft": SVFT(), "svdiff": SVDiff()}


def method_named(name: str) -> Method:
    """The method called ``name``.

    Raises:
        UserError: there is none; the message lists them.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]


def combined_core(sigma: Tensor, terms: Sequence[Term]) -> Tensor:
    """Core of all adapters of a layer: those of one method combine by its rule, the methods' cores add up."""
    by_method: dict[str, list[Term]] = {}
    for term in terms:
        by_method.setdefault(term.options.method, []).append(term)
    return sum_of_cores([METHODS[method].core(sigma, group) for method, group in by_method.items()])


def _check_pattern(method: str, pattern: str, patterns: Sequence[str]) -> None:
    if pattern not in patterns:
        raise UserError(f"unknown pattern {pattern!r} for method {method}; choose from {', '.join(patterns)}")
