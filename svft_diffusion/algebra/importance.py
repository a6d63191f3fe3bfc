"""What each number of an adapter is worth: the part it has in the size of all that the adapter changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.adapters.layers.computing import norm_update
from svft_diffusion.adapters.methods import Term, combined_core, core_rows_and_columns
from svft_diffusion.spectral import core_matrix


@dataclass(frozen=True)
class LayerChange:
    """What an adapter changes in one layer at strength 1.

    Attributes:
        term: the adapter's part there, on the CPU.
        energies: (|Omega|,) float64: square of what each value changes in the core matrix. ``U`` and ``V`` are
            orthonormal, so their sum is the squared Frobenius norm of the weight's update.
        energy_of_shifts: squared norm of what the bias and a norm's weight change by.
    """

    term: Term
    energies: Tensor
    energy_of_shifts: float

    @property
    def number_of_shifts(self) -> int:
        """Stored numbers behind `energy_of_shifts`."""
        return sum(tensor.numel() for part, tensor in self.term.parts.items() if part in ("bias", "norm"))

    @property
    def number_of_values(self) -> int:
        """All stored numbers of the layer, the gate among them."""
        return sum(tensor.numel() for tensor in self.term.parts.values())

    @property
    def energy(self) -> float:
        """Squared norm of everything that the adapter changes in the layer."""
        return float(self.energies.sum()) + self.energy_of_shifts


def change_of_layer(layer: SpectralLayer, adapter: str) -> LayerChange:
    """What an adapter changes in a layer that it has."""
    term = layer.term(adapter, on_cpu=True)
    energies = torch.zeros(0, dtype=torch.float64)
    shifts = 0.0
    if "values" in term.parts:
        assert layer.factors is not None
        core, _ = combined_core(layer.factors.S, [term])
        energies = core_matrix(core)[core_rows_and_columns(term)].double().square()
    if "bias" in term.parts:
        shifts += float(term.parts["bias"].double().square().sum())
    if "norm" in term.parts:
        weight = layer.get_base_layer().weight
        assert isinstance(weight, Tensor)
        shifts += float(norm_update(weight.detach().cpu(), [term]).double().square().sum())
    return LayerChange(term, energies, shifts)


class Choice(NamedTuple):
    """The numbers of an adapter that are kept."""

    values: dict[str, Tensor]  # canonical layer -> which of its values, ascending, int64; none of a layer left out
    shifts: set[str]  # the layers whose bias and norm are kept

    @property
    def layers(self) -> list[str]:
        """The layers of which something is kept, sorted."""
        return sorted({*self.values, *self.shifts})


class _Shifts(NamedTuple):
    """Bias and norm of one layer, which are kept together or not at all."""

    layer: str
    number: int
    energy: float
    values_before: int  # how many values change more than one of these numbers does on average


class Ranking:
    """All numbers of an adapter in the order of what they change, over all layers.

    Values are ranked one by one. The shifts of a layer's bias and norm have no basis in which few numbers say most:
    those of one layer stay together and are ranked by their energy per number. What changes nothing is never kept.

    Attributes:
        energy: squared norm of everything that the adapter changes.
        whole: all numbers.
        most: those that change anything.
        fewest: the smallest number of which a choice is not empty.
    """

    def __init__(self, changes: Mapping[str, LayerChange]) -> None:
        self._layers = list(changes)
        lengths = [len(change.energies) for change in changes.values()]
        energies = torch.cat([change.energies for change in changes.values()])
        layer_of_value = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        place_of_value = torch.cat([torch.arange(length) for length in lengths])
        order = energies.argsort(descending=True, stable=True)
        order = order[: int((energies > 0).sum())]
        self._layer_of_value, self._place_of_value = layer_of_value[order], place_of_value[order]
        ascending = energies[order].flip(0)
        # Summed from the smallest on, so that the little that is dropped is known to its last digits.
        self._energy_after = [*ascending.cumsum(0).flip(0).tolist(), 0.0]
        self._shifts = self._ranked_shifts(changes, ascending)
        self.energy = self._energy_after[0] + math.fsum(shifts.energy for shifts in self._shifts)
        self.whole = sum(lengths) + sum(change.number_of_shifts for change in changes.values())
        self.most = len(order) + sum(shifts.number for shifts in self._shifts)
        self.fewest = 1 if len(order) else min((shifts.number for shifts in self._shifts), default=0)

    @staticmethod
    def _ranked_shifts(changes: Mapping[str, LayerChange], ascending: Tensor) -> list[_Shifts]:
        found = []
        for layer, change in changes.items():
            if change.energy_of_shifts > 0:
                density = change.energy_of_shifts / change.number_of_shifts
                smaller = int(torch.searchsorted(ascending, torch.tensor(density, dtype=torch.float64)))
                before = len(ascending) - smaller
                found.append((-density, _Shifts(layer, change.number_of_shifts, change.energy_of_shifts, before)))
        return [shifts for _, shifts in sorted(found)]

    def choice(self, number: int) -> Choice:
        """The most important numbers, at most ``number``. Shifts that no longer fit are passed over."""
        values, shifts = self._split(number)
        layers, places = self._layer_of_value[:values], self._place_of_value[:values]
        by_layer = {self._layers[index]: places[layers == index].sort().values for index in layers.unique().tolist()}
        return Choice(by_layer, {item.layer for item in shifts})

    def dropped(self, number: int) -> float:
        """Energy of what `choice` leaves out; it never grows with ``number``."""
        values, shifts = self._split(number)
        kept = {item.layer for item in shifts}
        left_out = math.fsum(item.energy for item in self._shifts if item.layer not in kept)
        return self._energy_after[values] + left_out

    def _split(self, number: int) -> tuple[int, list[_Shifts]]:
        """How many values, and which shifts."""
        kept: list[_Shifts] = []
        in_shifts = 0
        for shifts in self._shifts:
            if in_shifts + shifts.values_before + shifts.number <= number:
                kept.append(shifts)
                in_shifts += shifts.number
        return min(number - in_shifts, len(self._layer_of_value)), kept
