"""Shrinking an adapter to the numbers that matter most: a smaller file, with the error stated."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svft_diffusion.adapters import SpectralConfig, save_adapter, unload_adapter
from svft_diffusion.adapters.fitting import LAYOUT_FIELDS, check_free
from svft_diffusion.adapters.injection import refuse_fused
from svft_diffusion.adapters.installing import install_adapter
from svft_diffusion.adapters.methods import LISTED, METHODS
from svft_diffusion.adapters.names import check_adapter_name
from svft_diffusion.adapters.tokens import token_parameters, tokens_of, without_tokens
from svft_diffusion.adapters.training import adapted_layers, adapter_state
from svft_diffusion.algebra.importance import Choice, LayerChange, Ranking, change_of_layer
from svft_diffusion.algebra.layout import places
from svft_diffusion.errors import UserError
from svft_diffusion.files import AdapterMetadata, read_adapter
from svft_diffusion.files.adapter_file import adapter_bytes
from svft_diffusion.files.names import components_of
from svft_diffusion.files.tensor_names import POSITIONS, tensor_name
from svft_diffusion.spectral import gated_values

# Lines of the printed report; the JSON form has everything.
_LISTED_LAYERS = 8


# Toys drawn with adapters that had lost this much were still themselves, with half as much again they were not.
_LARGE_ERROR = 0.5


@dataclass(frozen=True)
class ShrunkLayer:
    """What became of one layer."""

    layer: str  # canonical name
    numbers: int  # stored numbers before: values, gate, bias and norm
    kept: int  # and after
    norm: float  # of what the adapter changed in the layer: its weight and bias together
    error: float  # of what it changes now, relative to that


@dataclass(frozen=True)
class ShrinkReport:
    """What was kept of an adapter.

    Attributes:
        adapter: name of the shrunk adapter in the pipeline.
        layers: one entry for each layer that the whole adapter has.
        error: of everything that the adapter changes, relative to its size: the root of the dropped part of the
            squared norm.
    """

    adapter: str
    layers: list[ShrunkLayer]
    error: float

    def __str__(self) -> str:
        """Totals, and the layers that lose most."""
        totals = self._totals()
        text = [
            f"kept {totals['numbers_after']:,} of {totals['numbers_before']:,} numbers, "
            f"in {totals['layers_after']} of {totals['layers_before']} layers",
            f"error {self.error:.2g}, relative to all that the adapter changes",
        ]
        losing = sorted((layer for layer in self.layers if layer.error > 0), key=lambda item: -item.norm * item.error)
        text += ["  error  norm     layer"] if losing else []
        text += [f"  {item.error:<5.2g}  {item.norm:<7.2g}  {item.layer}" for item in losing[:_LISTED_LAYERS]]
        if len(losing) > _LISTED_LAYERS:
            text.append(f"  and {len(losing) - _LISTED_LAYERS} more layers, which lose less")
        return "\n".join(text)

    @property
    def warning(self) -> str | None:
        """What a person should know who looks at no figures."""
        if self.error <= _LARGE_ERROR:
            return None
        return f"the error is {self.error:.2g}: little may be left of the subject; draw with it before you share it"

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        layers = [asdict(layer) for layer in self.layers]
        return {"adapter": self.adapter, "error": self.error, **self._totals(), "layers": layers}

    def _totals(self) -> dict[str, int]:
        return {
            "numbers_before": sum(layer.numbers for layer in self.layers),
            "numbers_after": sum(layer.kept for layer in self.layers),
            "layers_before": len(self.layers),
            "layers_after": sum(layer.kept > 0 for layer in self.layers),
        }


@torch.no_grad()
def shrink_adapter(
    pipe: object,
    name: str,
    shrunk: str,
    *,
    keep: int | None = None,
    size: int | None = None,
    energy: float | None = None,
    metadata: AdapterMetadata | None = None,
) -> ShrinkReport:
    """Add adapter ``shrunk`` that has the most important numbers of adapter ``name``, which stays as it is.

    Kept are the values that change the core matrices most, over all layers together; ``U`` and ``V`` are orthonormal,
    so no other choice of as many values comes closer to the update in the Frobenius norm. (SVDiff's values count by
    what they change at strength 1, behind the relu.) The shifts of a layer's bias, or of a norm layer, are kept or
    dropped together, by their energy per number. Layers of which nothing is left leave the adapter.

    One of ``keep``, ``size`` and ``energy`` says how much. Where nothing has to go, the new adapter is the same as the
    other, in its pattern; else its pattern is ``listed``, whose files say where each value stands. As after loading,
    the new adapter is active beside those that were: choose with `set_adapters`. Learned tokens stay with ``name``,
    since two adapters can't bring the same one; give them to the new adapter once ``name`` is unloaded. They count in
    the size.

    Args:
        pipe: a diffusers pipeline, or a mapping of component names to models.
        name: the adapter to shrink.
        shrunk: name of the new one.
        keep: how many numbers.
        size: as many as fit in a file of this many bytes.
        energy: as few as keep this part of the squared norm of all changes, in (0, 1]; 1 drops only zeros.
        metadata: what the file is going to be saved with; needed with ``size``, of which it takes a part.

    Raises:
        UserError: no such adapter, it is fused or changes nothing, an argument is out of range, or the size can't be
            reached. The pipeline is as it was.
    """
    check_amount(keep, size, energy)
    components = components_of(pipe)
    check_adapter_name(shrunk)
    check_free(components, shrunk)
    layers = adapted_layers(components, name)
    for model in components.values():
        refuse_fused(model, f"shrink {name!r}")
    changes = {canonical: change_of_layer(layer, name) for canonical, layer in layers.items()}
    ranking = Ranking(changes)
    if ranking.energy == 0:
        raise UserError(f"adapter {name!r} changes nothing, so there is nothing to keep of it")
    config = _config_of(components, name)

    def install(number: int) -> None:
        choice = ranking.choice(number)
        install_adapter(components, shrunk, _options(config, changes, choice), _kept_tensors(changes, choice))

    def size_of_file(number: int) -> int:
        assert metadata is not None
        install(number)
        try:
            return _size_of_file(pipe, shrunk, metadata, tokens_of_adapter=name)
        finally:
            unload_adapter(pipe, shrunk)

    number = ranking.whole
    if size is not None:
        if metadata is None:
            raise UserError("a size needs the metadata that the file will be saved with: they take a part of it")
        if _size_of_file(pipe, name, metadata, tokens_of_adapter=name) > size:
            number = _largest_that_fits(size_of_file, size, ranking)
    elif energy is not None:
        number = _smallest_with_energy(ranking, energy)
    elif keep is not None:
        number = _checked_number(ranking, keep)
    if number == ranking.whole:
        options = {field: getattr(config, field) for field in (*LAYOUT_FIELDS, "seed", "targets")}
        install_adapter(components, shrunk, options, without_tokens(adapter_state(components, name)))
        return ShrinkReport(shrunk, [_whole_layer(canonical, change) for canonical, change in changes.items()], 0.0)
    install(number)
    choice = ranking.choice(number)
    kept = [_shrunk_layer(canonical, change, choice) for canonical, change in changes.items()]
    return ShrinkReport(shrunk, kept, math.sqrt(ranking.dropped(number) / ranking.energy))


def check_amount(keep: int | None, size: int | None, energy: float | None) -> None:
    """Raise `UserError` unless exactly one is given, and can be."""
    if sum(given is not None for given in (keep, size, energy)) != 1:
        raise UserError("say how much to keep by one of keep, size and energy")
    if keep is not None and keep < 1:
        raise UserError(f"keep must be at least 1 number, got {keep}")
    if size is not None and size < 1:
        raise UserError(f"the size must be at least 1 byte, got {size}")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy is the kept part of the squared norm, in (0, 1], got {energy}")


def _checked_number(ranking: Ranking, keep: int) -> int:
    if keep < ranking.fewest:
        raise UserError(
            f"the adapter has shifts of biases and norms alone, which are kept whole: keep at least {ranking.fewest}"
        )
    return min(keep, ranking.most)


def _smallest_with_energy(ranking: Ranking, energy: float) -> int:
    allowed = (1 - energy) * ranking.energy
    low, high = ranking.fewest, ranking.most
    while low < high:
        middle = (low + high) // 2
        if ranking.dropped(middle) <= allowed:
            high = middle
        else:
            low = middle + 1
    return low


def _size_of_file(pipe: object, name: str, metadata: AdapterMetadata, *, tokens_of_adapter: str) -> int:
    """Size of the file of adapter ``name``, with the learned tokens of an adapter that may be another."""
    with tempfile.TemporaryDirectory() as folder:
        header, tensors = read_adapter(
            save_adapter(pipe, name, Path(folder) / "adapter.safetensors", metadata=metadata)
        )
    header = replace(header, tokens=tokens_of(pipe, tokens_of_adapter))
    return len(adapter_bytes(header, {**tensors, **token_parameters(pipe, tokens_of_adapter)}))


def _largest_that_fits(size_of_file: Callable[[int], int], size: int, ranking: Ranking) -> int:
    """A number of which the file fits in ``size`` bytes, and that of the next number does not."""
    fits, too_large = ranking.fewest, ranking.most
    at_too_large = size_of_file(too_large)
    if at_too_large <= size:
        return too_large
    at_fits = size_of_file(fits)
    if at_fits > size:
        raise UserError(f"the adapter does not fit in {size:,} bytes: with as little as possible it has {at_fits:,}")
    by_halves = False
    while too_large - fits > 1:
        # A file grows nearly evenly, so a straight line leads there in a few steps; halves see to it that it ends.
        share = 0.5 if by_halves else (size - at_fits) / (at_too_large - at_fits)
        middle = min(max(fits + int(share * (too_large - fits)), fits + 1), too_large - 1)
        found = size_of_file(middle)
        if found <= size:
            fits, at_fits = middle, found
        else:
            too_large, at_too_large = middle, found
        by_halves = not by_halves
    return fits


def _config_of(components: Mapping[str, nn.Module], name: str) -> SpectralConfig:
    """The adapter's configuration, which is the same in all components but for their layers."""
    configs = [getattr(model, "peft_config", {}).get(name) for model in components.values()]
    return next(config for config in configs if config is not None)


def _options(config: SpectralConfig, changes: Mapping[str, LayerChange], choice: Choice) -> dict[str, Any]:
    parts = {part for canonical in choice.shifts for part in changes[canonical].term.parts}
    return {
        **{field: getattr(config, field) for field in (*LAYOUT_FIELDS, "seed", "targets")},
        "pattern": LISTED,
        "off_diagonals": 0,
        "init": "zero",  # a gate is multiplied into the values
        "train_values": bool(choice.values),
        "train_bias": "bias" in parts,
        "train_norm": True if "norm" in parts else config.train_norm,
    }


def _kept_tensors(changes: Mapping[str, LayerChange], choice: Choice) -> dict[str, Tensor]:
    """Tensors of the shrunk adapter, named as in a file."""
    tensors = {}
    for canonical in choice.layers:
        parts = changes[canonical].term.parts
        if canonical in choice.values:
            values, positions = _kept_values(changes[canonical], choice.values[canonical])
            tensors[tensor_name(canonical, "values")] = values
            tensors[tensor_name(canonical, POSITIONS)] = positions
        if canonical in choice.shifts:
            tensors |= {tensor_name(canonical, part): parts[part] for part in ("bias", "norm") if part in parts}
    return tensors


def _kept_values(change: LayerChange, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen values with any gate in them, and where they stand (int32), by ascending position."""
    term = change.term
    values = term.parts["values"]
    if "gate" in term.parts:
        values = gated_values(values, term.parts["gate"])
    rows, columns = places(term)
    positions = rows * term.options.rank + columns if METHODS[term.options.method].lists_entries else rows
    positions, order = positions[chosen].sort()
    return values[chosen][order], positions.int()


def _whole_layer(canonical: str, change: LayerChange) -> ShrunkLayer:
    return ShrunkLayer(canonical, change.number_of_values, change.number_of_values, math.sqrt(change.energy), 0.0)


def _shrunk_layer(canonical: str, change: LayerChange, choice: Choice) -> ShrunkLayer:
    places_kept = choice.values.get(canonical)
    left_out = torch.ones(len(change.energies), dtype=torch.bool)
    kept = 0
    if places_kept is not None:
        left_out[places_kept] = False
        kept += len(places_kept)
    dropped = float(change.energies[left_out].sum())
    if canonical in choice.shifts:
        kept += change.number_of_shifts
    else:
        dropped += change.energy_of_shifts
    error = math.sqrt(dropped / change.energy) if change.energy > 0 else 0.0
    return ShrunkLayer(canonical, change.number_of_values, kept, math.sqrt(change.energy), error)
