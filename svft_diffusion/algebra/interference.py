"""Do adapters get in each other's way? Compared before they are blended: direction, place and size of their updates.

The update of a layer is ``U M V^T`` with orthonormal columns in ``U`` and ``V``, so ``<U M V^T, U N V^T> = <M, N>``:
the core matrices say everything, and no weight is built. Shifts of biases and norms count with their layer.

* **cosine** of two updates: 1 where they pull alike, 0 where they are independent, -1 where one undoes the other.
* **overlap**: ``sum_p min(e1(p), e2(p))`` over the entries ``p`` of the core, with ``e(p)`` the share of an update's
  squared norm that the entry holds. It is the intersection of two histograms (Swain and Ballard, 1991): 1 where two
  updates spend their energy on the same pairs of singular vectors, 0 where they share none. Adapters on one basis meet
  there whatever their cosine: the interference that the SVDiff paper reports for added shifts.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.adapters.layers.computing import norm_update
from svft_diffusion.adapters.methods import METHODS, Term, common_triplets
from svft_diffusion.adapters.training import adapted_layers
from svft_diffusion.adapters.weights import AdapterWeight, weights_in_layers
from svft_diffusion.algebra.combine import summed_core
from svft_diffusion.algebra.layout import places
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import block_of, natural_order
from svft_diffusion.spectral import stack_cores

Pair = tuple[str, str]


@dataclass(frozen=True)
class Meeting:
    """How two updates meet in one place.

    Attributes:
        cosine: None where one of them is zero.
        overlap: from 0 to 1; None where one of them is zero.
        part_of_cosine: what the place adds to the cosine of the whole adapters; over all layers they add up to it.
        part_of_overlap: the same of the overlap.
    """

    cosine: float | None
    overlap: float | None
    part_of_cosine: float
    part_of_overlap: float


@dataclass(frozen=True)
class Place:
    """A layer, a block of layers, or all of them."""

    name: str
    norms: dict[str, float]  # adapter -> Frobenius norm of its update at its weight
    meetings: dict[Pair, Meeting]


@dataclass(frozen=True)
class Clipping:
    """Singular values that SVDiff's shifts, added up at these weights, push below zero, where the relu cuts them."""

    clipped: int
    trained: int
    layers: dict[str, int]  # canonical name -> clipped ones, where there are some

    @property
    def share(self) -> float:
        """Clipped ones of those that train."""
        return self.clipped / self.trained


@dataclass(frozen=True)
class Interference:
    """What `interference` finds; `svft_diffusion.algebra.interference_report` shows it.

    Attributes:
        weights: those at which the adapters were compared.
        balancing: those weights, each times a factor, so that updates of equal weight get equal norms; the factors
            average 1. For SVDiff up to what the relu cuts off.
        layers, blocks: places by name, in natural order.
        total: all layers together.
        clipping: None where no adapter is SVDiff.
    """

    weights: dict[str, AdapterWeight]
    balancing: dict[str, AdapterWeight]
    layers: list[Place]
    blocks: list[Place]
    total: Place
    clipping: Clipping | None

    @property
    def pairs(self) -> list[Pair]:
        """All pairs of adapters."""
        return list(itertools.combinations(self.weights, 2))

    @property
    def factors(self) -> dict[str, float]:
        """Adapter -> what takes its weight to the balancing one."""
        return {name: _largest(self.balancing[name]) / _largest(weight) for name, weight in self.weights.items()}

    def clashes(self) -> list[tuple[float, str, Pair]]:
        """What layers take away from the cosine of a pair of adapters, the layer, the pair; the worst first."""
        found = self._by_layer("part_of_cosine")
        return sorted((clash for clash in found if clash[0] < 0), key=lambda clash: clash[0])

    def most_shared(self) -> list[tuple[float, str, Pair]]:
        """What layers add to the overlap of a pair of adapters, the layer, the pair; the largest first."""
        found = self._by_layer("part_of_overlap")
        return sorted((shared for shared in found if shared[0] > 0), key=lambda shared: -shared[0])

    def _by_layer(self, part: str) -> list[tuple[float, str, Pair]]:
        return [
            (getattr(meeting, part), layer.name, pair)
            for layer in self.layers
            for pair, meeting in layer.meetings.items()
        ]


@torch.no_grad()
def interference(pipe: object, weights: Mapping[str, AdapterWeight]) -> Interference:
    """Compare the updates that adapters of a pipeline make, each alone at its weight, pair by pair.

    Args:
        pipe: a diffusers pipeline, or a mapping of component names to models.
        weights: as in `set_adapters`.

    Raises:
        UserError: unknown adapter, component or block; or an adapter changes nothing at its weight.
    """
    if not weights:
        raise UserError("there is no adapter to compare: all weights are 0")
    layers: dict[str, SpectralLayer] = {}
    terms: dict[str, dict[str, Term]] = defaultdict(dict)  # layer -> adapter -> its part, where its weight is not 0
    for name, weight in weights.items():
        by_layer = weights_in_layers(pipe, name, weight)
        for canonical, layer in adapted_layers(pipe, name).items():
            if by_layer[canonical] != 0:
                layers[canonical] = layer
                terms[canonical][name] = layer.term(name, strength=by_layer[canonical], on_cpu=True)
    ordered = sorted(terms, key=natural_order)
    names = list(weights)
    energies = {path: _energies(names, _updates(layers[path], terms[path])) for path in ordered}
    total = torch.stack([torch.zeros(len(names), dtype=torch.float64), *energies.values()]).sum(0)
    for name, size in zip(names, total.tolist(), strict=True):
        if size == 0:
            raise UserError(f"adapter {name!r} changes nothing at weight {weights[name]}; leave it out")
    of_blocks: dict[str, Tensor] = {}
    for canonical, energy in energies.items():
        of_blocks[block_of(canonical)] = of_blocks.get(block_of(canonical), torch.zeros_like(energy)) + energy
    counts = {block: _Sums(names) for block in of_blocks}
    of_all, of_layers = _Sums(names), []
    for canonical, energy in energies.items():
        updates, block = _updates(layers[canonical], terms[canonical]), block_of(canonical)
        of_layer = _Sums(names)
        of_layer.add(updates, energy, total)
        of_layers.append(of_layer.place(canonical, energy, total))
        counts[block].add(updates, of_blocks[block], total)
        of_all.add(updates, total, total)
    return Interference(
        weights=dict(weights),
        balancing=_balanced(weights, dict(zip(names, total.sqrt().tolist(), strict=True))),
        layers=of_layers,
        blocks=[counts[block].place(block, energy, total) for block, energy in of_blocks.items()],
        total=of_all.place("all", total, total),
        clipping=_clipping(layers, terms),
    )


class _Sums:
    """Sums over the entries of the updates in one place, for every pair of adapters."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._products: dict[Pair, float] = defaultdict(float)
        self._shared: dict[Pair, float] = defaultdict(float)  # of the place's own energy
        self._shared_of_all: dict[Pair, float] = defaultdict(float)

    def add(self, updates: Mapping[str, Tensor], energies: Tensor, total: Tensor) -> None:
        """Add a layer. ``energies`` are those of the whole place, ``total`` those of the whole adapters."""
        own = dict(zip(self._names, energies.tolist(), strict=True))
        of_all = dict(zip(self._names, total.tolist(), strict=True))
        for pair in itertools.combinations(self._names, 2):
            if not all(name in updates and own[name] > 0 for name in pair):
                continue
            first, second = (updates[name] for name in pair)
            self._products[pair] += float(first @ second)
            squares = first.square(), second.square()
            for sums, energy in ((self._shared, own), (self._shared_of_all, of_all)):
                shares = (square / energy[name] for square, name in zip(squares, pair, strict=True))
                sums[pair] += float(torch.minimum(*shares).sum())

    def place(self, name: str, energies: Tensor, total: Tensor) -> Place:
        """What was added up, as a place."""
        norms = dict(zip(self._names, energies.sqrt().tolist(), strict=True))
        of_all = dict(zip(self._names, total.sqrt().tolist(), strict=True))
        meetings = {}
        for pair in itertools.combinations(self._names, 2):
            length = norms[pair[0]] * norms[pair[1]]
            product = self._products[pair]
            meetings[pair] = Meeting(
                cosine=max(-1.0, min(1.0, product / length)) if length else None,
                overlap=min(1.0, self._shared[pair]) if length else None,
                part_of_cosine=product / (of_all[pair[0]] * of_all[pair[1]]),
                part_of_overlap=self._shared_of_all[pair],
            )
        return Place(name, norms, meetings)


def _energies(names: Iterable[str], updates: Mapping[str, Tensor]) -> Tensor:
    """Squared norms of the updates, (adapters,) float64; zero for adapters that are not in the layer."""
    return torch.stack(
        [updates[name].square().sum() if name in updates else torch.zeros(()).double() for name in names]
    )


def _updates(layer: SpectralLayer, terms: Mapping[str, Term]) -> dict[str, Tensor]:
    """What each adapter changes in a layer, as vectors (p,) float64 over one orthonormal basis."""
    parts: dict[str, list[Tensor]] = {name: [] for name in terms}
    with_values = {name: term for name, term in terms.items() if "values" in term.parts}
    if with_values:
        assert layer.factors is not None
        sigma = layer.factors.S
        common = common_triplets(len(sigma), list(with_values.values()))
        cores = [METHODS[term.options.method].core(sigma, common, [term]) for term in with_values.values()]
        for name, entries in zip(with_values, stack_cores(cores).entries, strict=True):
            parts[name].append(entries.flatten())
        for name in terms.keys() - with_values.keys():
            parts[name].append(torch.zeros(stack_cores(cores).entries[0].numel()))
    base_layer = layer.get_base_layer()
    for part, parameter in (("norm", base_layer.weight), ("bias", getattr(base_layer, "bias", None))):
        if any(part in term.parts for term in terms.values()):
            assert isinstance(parameter, Tensor)
            base = parameter.detach().cpu().float()
            for name, term in terms.items():
                parts[name].append(_shift(part, base, term) if part in term.parts else torch.zeros_like(base))
    return {name: torch.cat(pieces).double() for name, pieces in parts.items()}


def _shift(part: str, base: Tensor, term: Term) -> Tensor:
    return norm_update(base, [term]) if part == "norm" else term.strength * term.parts["bias"]


def _clipping(layers: Mapping[str, SpectralLayer], terms: Mapping[str, Mapping[str, Term]]) -> Clipping | None:
    trained, clipped = 0, {}
    for canonical, by_name in terms.items():
        shifts = [term for term in by_name.values() if term.options.method == "svdiff" and "values" in term.parts]
        factors = layers[canonical].factors
        if not shifts or factors is None:
            continue
        delta = summed_core(shifts, len(factors.S))
        assert delta is not None
        triplets = torch.cat([places(term)[0] for term in shifts]).unique()
        trained += len(triplets)
        clipped[canonical] = int((factors.S + delta.entries[:, 0] < 0)[triplets].sum())
    if not trained:
        return None
    return Clipping(sum(clipped.values()), trained, {layer: count for layer, count in clipped.items() if count})


def _balanced(weights: Mapping[str, AdapterWeight], norms: Mapping[str, float]) -> dict[str, AdapterWeight]:
    """The weights times factors that make the norms go as the weights do."""
    at_weight_1 = {name: norms[name] / _largest(weight) for name, weight in weights.items()}
    target = len(at_weight_1) / math.fsum(1 / norm for norm in at_weight_1.values())
    return {name: _multiplied(weight, target / at_weight_1[name]) for name, weight in weights.items()}


def _largest(weight: AdapterWeight | Mapping[str, float]) -> float:
    return max(map(_largest, weight.values())) if isinstance(weight, Mapping) else abs(weight)


def _multiplied(weight: AdapterWeight, factor: float) -> AdapterWeight:
    if not isinstance(weight, Mapping):
        return weight * factor
    return {
        component: {block: value * factor for block, value in part.items()}
        if isinstance(part, Mapping)
        else part * factor
        for component, part in weight.items()
    }
