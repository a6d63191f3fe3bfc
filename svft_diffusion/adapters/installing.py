"""Making a live adapter of tensors that no training and no file of ours gave: imports, blends, shrunk adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.fitting import config_of_layers, paths_by_component
from svft_diffusion.adapters.injection import inject
from svft_diffusion.adapters.joining import joining
from svft_diffusion.adapters.training import load_adapter_state
from svft_diffusion.files.tensor_names import layer_names


def install_adapter(
    components: Mapping[str, nn.Module], name: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Add an adapter to exactly the layers that have tensors; it is active at weight 1 beside others, and frozen.

    Args:
        components: see `svft_diffusion.files.names.components_of`.
        name: of the new adapter; it must be free.
        options: fields of `SpectralConfig` other than ``target_modules`` and those that the tensors tell.
        tensors: named as in an adapter file, without the sketch. Values stand on the basis that the layers have.

    Raises:
        UserError: a layer can't carry them; the models are as they were.
    """
    paths = paths_by_component("the adapter", components, layer_names(tensors))
    models = {component: components[component] for component in components if component in paths}
    with joining(models, name):
        for component, model in models.items():
            inject(model, config_of_layers(options, paths[component], tensors), name, list(paths[component]))
        with torch.inference_mode(False):
            load_adapter_state(models, name, tensors)
