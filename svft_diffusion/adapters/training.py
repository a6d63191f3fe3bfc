"""What a trainer needs: trainable adapters on a frozen base, and their state for checkpoints.

Models are given as a mapping of component names to models, ``{"unet": unet, "text_encoder": text_encoder}`` with
only those that train, or as a pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.config import SpectralConfig
from svft_diffusion.adapters.injection import adapters_of, inject, remove, spectral_layers
from svft_diffusion.errors import UserError
from svft_diffusion.files.adapter_file import VALUES_SUFFIX
from svft_diffusion.files.names import canonical_name, components_of


def add_training_adapter(models: object, config: SpectralConfig, name: str = "default") -> list[nn.Parameter]:
    """Add a trainable adapter to every model given, freeze everything else in them, return what trains.

    The parameters are float32 whatever the dtype of the models, and start at zero: the first step sees the base.

    Raises:
        UserError: a model has no layer that ``config`` targets, or can't carry the adapter; all are as they were.
    """
    components = components_of(models)
    done: list[nn.Module] = []
    try:
        for component, model in components.items():
            if name in adapters_of(model):
                raise UserError(f"{component} already has an adapter {name!r}")
            try:
                inject(model, config, name)
            except UserError as problem:
                raise UserError(f"{component}: {problem}") from problem
            done.append(model)
    except Exception:
        for model in done:
            remove(model, name)
        raise
    parameters = []
    for model in components.values():
        model.requires_grad_(False)
        for layer in spectral_layers(model, name).values():
            layer.set_adapter([name])
            parameters.append(layer.spectral_values[name])
    return parameters


def adapter_state(models: object, name: str) -> dict[str, Tensor]:
    """Trained values of an adapter by canonical name, ``<layer>.values``: copies on the CPU, float32.

    Raises:
        UserError: there is no such adapter.
    """
    return {key: values.detach().cpu().clone() for key, values in adapter_parameters(models, name).items()}


def load_adapter_state(models: object, name: str, state: Mapping[str, Tensor]) -> None:
    """Copy a state from `adapter_state` into an adapter of the same shape, in place.

    Raises:
        UserError: there is no such adapter, or names or shapes differ; nothing is changed then.
    """
    parameters = adapter_parameters(models, name)
    if parameters.keys() != state.keys():
        different = sorted(parameters.keys() ^ state.keys())
        raise UserError(
            f"the state does not fit adapter {name!r}: {len(different)} layers differ, such as {different[0]}"
        )
    for key, values in parameters.items():
        if values.shape != state[key].shape:
            raise UserError(f"the state does not fit adapter {name!r}: {key} has another number of values")
    with torch.no_grad():
        for key, values in parameters.items():
            values.copy_(state[key])


def adapter_parameters(models: object, name: str) -> dict[str, nn.Parameter]:
    """The live parameters of an adapter by canonical name. Raises as `adapter_state`."""
    parameters = {
        f"{canonical_name(component, model, path)}{VALUES_SUFFIX}": layer.spectral_values[name]
        for component, model in components_of(models).items()
        for path, layer in spectral_layers(model, name).items()
    }
    if not parameters:
        known = {other for model in components_of(models).values() for other in adapters_of(model)}
        raise UserError(f"there is no adapter {name!r}; loaded: {', '.join(sorted(known)) or 'none'}")
    return parameters
