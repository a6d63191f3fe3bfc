"""What a trainer needs: trainable adapters on a frozen base, and their state for checkpoints.

Models are given as a mapping of component names to models, ``{"unet": unet, "text_encoder": text_encoder}`` with
only those that train, or as a pipeline.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.alignment import align_layers, layers_by_name, measured_error, stored_bases
from svft_diffusion.adapters.config import SpectralConfig
from svft_diffusion.adapters.injection import adapters_of, inject, remove, spectral_layers
from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.adapters.tokens import check_token_rows, copy_token_rows, token_parameters, without_tokens
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import components_of
from svft_diffusion.files.tensor_names import POSITIONS, SKETCH, layer_names, tensor_name

_logger = logging.getLogger(__name__)

LARGEST_SILENT_ERROR = 1e-3
"""Relative error of an adapter's update below which nobody needs to know."""


def add_training_adapter(models: object, config: SpectralConfig, name: str = "default") -> list[nn.Parameter]:
    """Add a trainable adapter to every model given, freeze everything else in them, return what trains.

    The parameters are float32 whatever the dtype of the models. Unless ``config`` says otherwise they start at zero:
    the first step sees the base.

    Raises:
        UserError: a model has no layer that ``config`` targets, or can't carry the adapter; all are as they were.
    """
    components = components_of(models)
    started: list[nn.Module] = []
    layers = [layer for model in components.values() for layer in spectral_layers(model).values()]
    active = [(layer, list(layer.active_adapters)) for layer in layers]
    trains = [(parameter, parameter.requires_grad) for model in components.values() for parameter in model.parameters()]
    try:
        for component, model in components.items():
            if name in adapters_of(model):
                raise UserError(f"{component} already has an adapter {name!r}")
            started.append(model)
            try:
                inject(model, config, name)
            except UserError as problem:
                raise UserError(f"{component}: {problem}") from problem
    except BaseException:
        for model in started:
            remove(model, name)
        for layer, names in active:
            layer.set_adapter(names)
        for parameter, trained in trains:
            parameter.requires_grad_(trained)
        raise
    parameters: list[nn.Parameter] = []
    for model in components.values():
        model.requires_grad_(False)
        for layer in spectral_layers(model, name).values():
            layer.set_adapter([name])
            parameters += layer.trained_parts(name).values()
    return parameters


def adapter_parameters(models: object, name: str) -> dict[str, nn.Parameter]:
    """The live parameters of an adapter, ``<canonical layer>.<part>``, part being values, bias, norm or gate.

    Raises:
        UserError: there is no such adapter.
    """
    return {
        tensor_name(canonical, part): parameter
        for canonical, layer in adapted_layers(models, name).items()
        for part, parameter in layer.trained_parts(name).items()
    }


def adapter_state(models: object, name: str) -> dict[str, Tensor]:
    """What was trained, ``<canonical layer>.positions`` where a pattern lists them, and ``<text encoder>.tokens`` where
    it has tokens: copies on the CPU.

    Raises:
        UserError: there is no such adapter.
    """
    tensors = live_tensors(adapted_layers(models, name), name) | dict(token_parameters(models, name))
    return {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}


def load_adapter_state(models: object, name: str, state: Mapping[str, Tensor]) -> None:
    """Copy a state from `adapter_state` into an adapter of the same shape, in place.

    A ``sketch``, which the tensors of an adapter file have, aligns the layers' bases to it; an update that differs
    from the trained one all the same is logged as a warning.

    Raises:
        UserError: there is no such adapter, or names or shapes differ, or the sketch is damaged; nothing is changed
            then.
    """
    layers = adapted_layers(models, name)
    bases = stored_bases(state)
    check_token_rows(models, name, state)
    copy_tensors(layers, name, without_tokens(state))
    copy_token_rows(models, name, state)
    align_layers(layers, name, bases)
    error = measured_error(layers, name, bases)
    if not error.total <= LARGEST_SILENT_ERROR:
        _logger.warning("adapter %r does not do what it did where it was saved: its update is off by %s", name, error)


def adapted_layers(models: object, name: str) -> dict[str, SpectralLayer]:
    """The layers that carry an adapter, by canonical name. Raises as `adapter_state`."""
    components = components_of(models)
    layers = layers_by_name(components, name)
    if not layers:
        known = {other for model in components.values() for other in adapters_of(model)}
        raise UserError(f"there is no adapter {name!r}; loaded: {', '.join(sorted(known)) or 'none'}")
    return layers


def live_tensors(layers: Mapping[str, SpectralLayer], name: str) -> dict[str, Tensor]:
    """The tensors of an adapter themselves, named as in its file, without the sketch."""
    tensors: dict[str, Tensor] = {}
    for canonical, layer in layers.items():
        for part, parameter in layer.trained_parts(name).items():
            tensors[tensor_name(canonical, part)] = parameter
        positions = layer.positions(name)
        if positions is not None:
            tensors[tensor_name(canonical, POSITIONS)] = positions
    return tensors


def copy_tensors(layers: Mapping[str, SpectralLayer], name: str, state: Mapping[str, Tensor]) -> None:
    """Copy trained parts and positions into an adapter's own tensors; a sketch among them is passed over.

    Raises:
        UserError: names, shapes or positions are not the adapter's; nothing is changed then.
    """
    tensors = live_tensors(layers, name)
    given = state.keys() - {SKETCH}
    if different := sorted(tensors.keys() ^ given):
        raise UserError(
            f"the state does not fit adapter {name!r}: {len(layer_names(different))} layers differ, "
            f"such as {different[0]}"
        )
    for key, tensor in tensors.items():
        if tensor.shape != state[key].shape:
            raise UserError(f"the state does not fit adapter {name!r}: {key} has another number of values")
    for canonical, layer in layers.items():
        _check_positions(name, canonical, layer, state.get(tensor_name(canonical, POSITIONS)))
    moved = [
        layer
        for canonical, layer in layers.items()
        if (key := tensor_name(canonical, POSITIONS)) in tensors
        and not torch.equal(tensors[key].cpu(), state[key].cpu())
    ]
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(state[key])
    for layer in moved:  # what describes their basis went by the positions they had
        layer.renew_sketch(name)


def _check_positions(name: str, canonical: str, layer: SpectralLayer, positions: Tensor | None) -> None:
    if positions is None:
        return
    options = layer.options[name]
    assert layer.factors is not None
    # Triplets of the layer, or entries of the core matrix over those that train.
    places = len(layer.factors.S) if options.listed_triplets else options.rank**2
    if int(positions.min()) < 0 or int(positions.max()) >= places:
        raise UserError(f"the state does not fit adapter {name!r}: {canonical} has no such positions")
