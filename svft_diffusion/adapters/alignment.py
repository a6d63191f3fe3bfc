"""Does an adapter do here what it did where it was trained? Its basis is aligned, and the difference is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.errors import UserError
from svft_diffusion.files.adapter_file import bases_of
from svft_diffusion.files.basis_records import LayerBasis, pack_bases
from svft_diffusion.files.names import canonical_name
from svft_diffusion.files.tensor_names import tensor_name
from svft_diffusion.spectral import probe_error


class UpdateError(NamedTuple):
    """How far an adapter's update is from the one that was trained, relative to the latter's size."""

    total: float  # over all layers: root of the sum of squares
    worst_layer: str | None  # canonical name of the layer with the largest part in it; None without any layer
    worst: float  # that layer's own relative error

    def __str__(self) -> str:
        return f"{self.total:.2g} of its size; layer {self.worst_layer} differs most, by {self.worst:.2g}"


def layers_by_name(components: Mapping[str, nn.Module], adapter: str) -> dict[str, SpectralLayer]:
    """The layers that carry an adapter, by canonical name."""
    return {
        canonical_name(component, model, path): layer
        for component, model in components.items()
        for path, layer in spectral_layers(model, adapter).items()
    }


def sketch_of_bases(layers: Mapping[str, SpectralLayer], adapter: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor ``sketch`` of an adapter file: bases of the layers, by canonical name, that have values.

    Args:
        tensors: what the file holds of the adapter, which may be rounded; the probes are of that.
    """
    bases = {}
    for name, layer in layers.items():
        parts = {part: tensors[tensor_name(name, part)].float() for part in layer.trained_parts(adapter)}
        probes = layer.probes(adapter, parts)
        if probes is not None:
            bases[name] = LayerBasis(layer.sketch(adapter), probes)
    return pack_bases(bases) if bases else None


def stored_bases(tensors: Mapping[str, Tensor]) -> dict[str, LayerBasis]:
    """Bases by canonical name of the layer, from the tensors of an adapter file.

    Raises:
        UserError: the sketch does not belong to these tensors.
    """
    try:
        return bases_of(tensors)
    except ValueError as problem:
        raise UserError(f"the adapter has a damaged sketch: {problem}") from problem


def align_layers(layers: Mapping[str, SpectralLayer], adapter: str, bases: Mapping[str, LayerBasis]) -> None:
    """Let the values of an adapter mean on each layer's factors what they meant on those that ``bases`` describe.

    Raises:
        UserError: a layer's sketch can't be one of it.
    """
    for name, basis in bases.items():
        try:
            layers[name].align(adapter, basis.sketch)
        except ValueError as problem:
            raise UserError(f"the adapter has a damaged sketch of layer {name}: {problem}") from problem


def measured_error(layers: Mapping[str, SpectralLayer], adapter: str, bases: Mapping[str, LayerBasis]) -> UpdateError:
    """What is left between the update that the probes in ``bases`` saw and the one that the layers make now."""
    if not bases:
        return UpdateError(0.0, None, 0.0)
    stored = {name: basis.probes.double() for name, basis in bases.items()}
    found = {name: _probes(layers[name], adapter) for name in bases}
    distances = {name: float((found[name] - stored[name]).norm()) for name in bases}
    # What is not a number is the worst of all.
    worst = max(distances, key=lambda name: math.inf if math.isnan(distances[name]) else distances[name])
    total = probe_error(torch.cat(list(stored.values())), torch.cat(list(found.values())))
    return UpdateError(float(total), worst, float(probe_error(stored[worst], found[worst])))


def _probes(layer: SpectralLayer, adapter: str) -> Tensor:
    probes = layer.probes(adapter)
    assert probes is not None
    return probes.cpu().double()
