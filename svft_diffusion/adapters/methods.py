"""The methods, one row each: which values a layer trains and which core matrix they make.

A new method is a module in `svft_diffusion.spectral` with its formulas, a class here and a row in `METHODS`.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from svft_diffusion.errors import UserError
from svft_diffusion.spectral import (
    Core,
    SingularFactors,
    TripletSelection,
    banded_core,
    banded_positions,
    diagonal_core,
    embed_core,
    gated_values,
    number_of_banded_positions,
    official_initial_values,
    random_positions,
    selected_triplets,
    sparse_core,
    spectral_shift,
    sum_of_cores,
    top_k_positions,
)

if TYPE_CHECKING:
    from svft_diffusion.adapters.config import SpectralConfig

Triplets = slice | Tensor
Strength = float | Tensor

INITS = ("zero", "random", "official")
SELECTIONS = ("bottom", "top", "all", "random")
NORM_SHIFTS = ("vector", "scalar")
LISTED = "listed"
"""The pattern of adapters of which only some values were kept: a file has any number of them in each layer, and says
where they stand. Nothing says it beforehand, so it is no choice for training."""
DEFAULT_FRACTION = 0.2  # SiVA

_RANDOM_INIT_DEVIATION = 0.01


@dataclass(frozen=True)
class LayerOptions:
    """What an adapter means for one layer."""

    method: str
    pattern: str
    off_diagonals: int
    rank: int  # triplets (u_i, sigma_i, v_i) that train; 0 where the layer has no singular values
    first: int  # the first of them, where they follow one another
    listed_triplets: bool  # they don't: the layer's positions list them
    init: str
    seed: int
    parts: frozenset[str]  # of values, bias, norm, gate
    norm_shift: str
    compress: bool
    listed_values: int = 0  # how many, with pattern listed

    @property
    def lists_positions(self) -> bool:
        """Whether the layer keeps a list: of entries of the core matrix, or of triplets."""
        return "values" in self.parts and (self.pattern in ("random", "top_k", LISTED) or self.listed_triplets)


@dataclass(frozen=True)
class Term:
    """One adapter's part in a layer."""

    strength: Strength
    options: LayerOptions
    parts: dict[str, Tensor]  # float32, by the names in `LayerOptions.parts`
    positions: Tensor | None

    @property
    def triplets(self) -> Triplets:
        """The triplets that the rows and columns of this term's core matrix stand for."""
        if self.options.listed_triplets:
            assert self.positions is not None
            return self.positions
        return slice(self.options.first, self.options.first + self.options.rank)


class Method(Protocol):
    """What a method has to answer."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of the core matrix that the method can train."""

    @property
    def lists_entries(self) -> bool:
        """Whether pattern listed names entries of the core matrix; else it names triplets."""

    @property
    def inits(self) -> tuple[str, ...]:
        """Ways to start that the method has."""

    def triplets(self, config: SpectralConfig, size: int, seed: int) -> Triplets:
        """Which of a layer's ``size`` triplets train. Raises ValueError where the options don't fit the layer."""

    def core(self, sigma: Tensor, triplets: Triplets, terms: Sequence[Term]) -> Core:
        """The core matrix over ``triplets`` that all adapters of this method make together in a layer."""


class LeadingTriplets:
    """Methods that train the leading ``rank`` triplets, or all."""

    def triplets(self, config: SpectralConfig, size: int, seed: int) -> Triplets:
        if config.rank is not None and config.rank > size:
            raise ValueError(f"it has {size} singular values, fewer than rank={config.rank}; use a smaller rank")
        return slice(0, config.rank or size)


class SVFT(LeadingTriplets):
    """Core matrices of several adapters add up, each times its strength."""

    patterns = ("plain", "banded", "random", "top_k")
    lists_entries = True
    inits = INITS

    def core(self, sigma: Tensor, triplets: Triplets, terms: Sequence[Term]) -> Core:
        cores = []
        for term in terms:
            core = _svft_core(term)
            scaled = Core(term.strength * core.entries, core.dense)
            cores.append(_placed(scaled, term.triplets, triplets, len(sigma)))
        return sum_of_cores(cores)


class SVDiff(LeadingTriplets):
    """Shifts of several adapters add up inside the relu (SVDiff, Eq. 4)."""

    patterns = ("plain",)
    lists_entries = False
    inits = ("zero", "random")

    def core(self, sigma: Tensor, triplets: Triplets, terms: Sequence[Term]) -> Core:
        deltas = [
            term.parts["values"]
            if _same_triplets(term.triplets, triplets)
            else _placed(diagonal_core(term.parts["values"]), term.triplets, triplets, len(sigma)).entries[:, 0]
            for term in terms
        ]
        return diagonal_core(spectral_shift(sigma[triplets], deltas, [term.strength for term in terms]))


class VectorFit(LeadingTriplets):
    """Singular values train without a relu, so shifts of several adapters add up."""

    patterns = ("plain",)
    lists_entries = False
    inits = ("zero", "random")

    def core(self, sigma: Tensor, triplets: Triplets, terms: Sequence[Term]) -> Core:
        shifts = [term.strength * term.parts["values"] for term in terms]
        if all(_same_triplets(term.triplets, triplets) for term in terms):  # the usual case, and the quick one
            return diagonal_core(reduce(operator.add, shifts))
        return sum_of_cores(
            [
                _placed(diagonal_core(shift), term.triplets, triplets, len(sigma))
                for shift, term in zip(shifts, terms, strict=True)
            ]
        )


class SiVA(VectorFit):
    """The same for a selection of the singular values."""

    def triplets(self, config: SpectralConfig, size: int, seed: int) -> Triplets:
        assert config.fraction is not None and config.select is not None
        return selected_triplets(size, config.fraction, cast(TripletSelection, config.select), seed)


METHODS: dict[str, Method] = {"svft": SVFT(), "svdiff": SVDiff(), "vectorfit": VectorFit(), "siva": SiVA()}


def combined_core(sigma: Tensor, terms: Sequence[Term]) -> tuple[Core, Triplets]:
    """Core matrix of all adapters of a layer, and the triplets it stands on (all of them where adapters differ).

    Adapters of one method combine by its rule, the methods' cores add up.
    """
    common = common_triplets(len(sigma), terms)
    by_method: dict[str, list[Term]] = {}
    for term in terms:
        by_method.setdefault(term.options.method, []).append(term)
    cores = [METHODS[method].core(sigma, common, group) for method, group in by_method.items()]
    return sum_of_cores(cores), common


def common_triplets(size: int, terms: Sequence[Term]) -> Triplets:
    """The triplets that all terms stand on, or all ``size`` where the terms differ."""
    common = terms[0].triplets
    return common if all(_same_triplets(common, term.triplets) for term in terms[1:]) else slice(0, size)


def core_rows_and_columns(term: Term) -> tuple[Tensor, Tensor]:
    """Row and column in the core matrix of each of a term's values, each (|Omega|,) int64."""
    options = term.options
    if options.listed_triplets or not options.lists_positions:
        return banded_positions(options.rank, options.off_diagonals, device=term.parts["values"].device)
    assert term.positions is not None
    flat = term.positions.long()
    return flat // options.rank, flat % options.rank


def trained_triplets(config: SpectralConfig, size: int, seed: int, listed: int) -> Triplets:
    """Which of a layer's ``size`` triplets train.

    Args:
        listed: number of the layer's values with pattern listed. Where these stand on triplets of their own, the
            first ones hold their places until those in the file are copied in.

    Raises:
        ValueError: the options don't fit the layer.
    """
    method = METHODS[config.method]
    if config.pattern != LISTED or method.lists_entries:
        return method.triplets(config, size, seed)
    if not 1 <= listed <= size:
        raise ValueError(f"it has {size} singular values, and {listed} are listed")
    return torch.arange(listed)


def number_of_values(options: LayerOptions) -> int:
    """Trained entries of the core matrix. Raises ValueError where the options don't fit the layer."""
    if options.pattern == LISTED:
        places = options.rank if options.listed_triplets else options.rank**2
        if not 1 <= options.listed_values <= places:
            raise ValueError(f"it has {places} places for values, and {options.listed_values} are listed")
        return options.listed_values
    if options.off_diagonals >= options.rank:
        raise ValueError(
            f"off_diagonals={options.off_diagonals} is too large for {options.rank} singular values: "
            f"use at most {options.rank - 1}"
        )
    return number_of_banded_positions(options.rank, options.off_diagonals)


def initial_positions(options: LayerOptions, triplets: Triplets, factors: SingularFactors) -> Tensor | None:
    """What the layer lists (int32), or None: flat positions ``row * rank + column``, or triplets."""
    if not options.lists_positions:
        return None
    if isinstance(triplets, Tensor):
        return triplets.to(torch.int32)
    count = number_of_values(options)
    if options.pattern == LISTED:
        return torch.arange(count, dtype=torch.int32)  # until those in the file are copied in
    if options.pattern == "random":
        return random_positions(options.rank, count, options.seed)
    return top_k_positions(factors.U[:, triplets], factors.Vh[triplets], count)


def initial_values(options: LayerOptions) -> Tensor:
    """Values (|Omega|,) float32 that a new adapter starts from."""
    count = number_of_values(options)
    generator = torch.Generator().manual_seed(options.seed)
    if options.init == "official":
        return official_initial_values(count, generator)
    if options.init == "random":
        return _RANDOM_INIT_DEVIATION * torch.randn(count, generator=generator)
    return torch.zeros(count)


def seed_of_layer(seed: int, path: str) -> int:
    """A seed for one layer: layers of equal size get different positions and values from one seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{path}".encode()).digest()[:7], "big")


def method_named(name: str) -> Method:
    """The method called ``name``.

    Raises:
        UserError: there is none; the message lists them.
    """
    return METHODS[_known("method", name, METHODS)]


def check_options(config: SpectralConfig) -> None:
    """Check the options of a configuration against its method, and fill in the method's defaults.

    Raises:
        UserError: an option that the method does not have, or a number that can't be.
    """
    method = method_named(config.method)
    if config.pattern != LISTED:
        _known("pattern", config.pattern, method.patterns, f" for method {config.method}")
    if (config.pattern == LISTED) != (config.numbers_of_values is not None):
        raise UserError("pattern listed comes with numbers_of_values, from an adapter file; train with another pattern")
    _known("init", config.init, method.inits, f" for method {config.method}")
    _known("norm_shift", config.norm_shift, NORM_SHIFTS)
    _check_off_diagonals(config)
    _check_selection(config)
    if config.rank is not None and config.rank < 1:
        raise UserError(f"rank must be at least 1 (or left out, for all singular values), got {config.rank}")
    if not (config.train_values or config.train_bias or config.train_norm):
        raise UserError("nothing would train: train_values, train_bias and train_norm are all off")


def _check_off_diagonals(config: SpectralConfig) -> None:
    if config.pattern in ("plain", LISTED) and config.off_diagonals != 0:
        banded = "pattern banded" if config.method == "svft" else "method svft with pattern banded"
        remedy = f"use {banded}, or off_diagonals 0"
        raise UserError(
            f"pattern {config.pattern} has no off-diagonals, got off_diagonals={config.off_diagonals}; {remedy}"
        )
    if config.pattern == "banded" and config.off_diagonals < 1:
        raise UserError(
            f"pattern banded needs off_diagonals of at least 1, got {config.off_diagonals}; 2 is a good start"
        )
    if config.off_diagonals < 0:
        raise UserError(f"off_diagonals can't be negative, got {config.off_diagonals}")


def _check_selection(config: SpectralConfig) -> None:
    if config.method != "siva":
        for option in ("fraction", "select"):
            if getattr(config, option) is not None:
                raise UserError(f"{option} belongs to method siva; method {config.method} takes a rank")
        return
    if config.rank is not None:
        raise UserError("method siva takes a fraction of the singular values, no rank")
    config.fraction = DEFAULT_FRACTION if config.fraction is None else config.fraction
    config.select = _known("select", SELECTIONS[0] if config.select is None else config.select, SELECTIONS)
    if not 0 < config.fraction <= 1:
        raise UserError(f"fraction must lie in (0, 1], got {config.fraction}; {DEFAULT_FRACTION} is a good start")


def _known(option: str, value: str, choices: Sequence[str] | dict[str, Method], suffix: str = "") -> str:
    if value not in choices:
        raise UserError(f"unknown {option} {value!r}{suffix}; choose from {', '.join(choices)}")
    return value


def _svft_core(term: Term) -> Core:
    values, options = term.parts["values"], term.options
    if "gate" in term.parts:
        values = gated_values(values, term.parts["gate"])
    if options.lists_positions:
        assert term.positions is not None
        return sparse_core(values, term.positions, options.rank)
    return banded_core(values, options.rank, options.off_diagonals)


def _placed(core: Core, triplets: Triplets, common: Triplets, size: int) -> Core:
    """A core over ``triplets`` as one over ``common``: the same ones, or all ``size``."""
    if _same_triplets(triplets, common):
        return core
    return embed_core(core, triplets.long() if isinstance(triplets, Tensor) else triplets, size)


def _same_triplets(first: Triplets, second: Triplets) -> bool:
    if isinstance(first, slice) or isinstance(second, slice):
        return isinstance(first, slice) and isinstance(second, slice) and first == second
    return first is second  # equal lists are not looked for: that would wait for the device, and end a compiled graph
