"""Making a live adapter of tensors that no training and no file of ours gave: imports, blends, shrunk adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.config import SpectralConfig
from svft_diffusion.adapters.fitting import listed_fields
from svft_diffusion.adapters.injection import inject
from svft_diffusion.adapters.joining import joining
from svft_diffusion.adapters.training import load_adapter_state
from svft_diffusion.files.names import module_path, split_canonical_name
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
    paths: dict[str, dict[str, str]] = {}  # component -> path -> canonical name
    for layer in layer_names(tensors):
        component, path = split_canonical_name(layer)
        paths.setdefault(component, {})[module_path(components[component], path)] = layer
    models = {component: components[component] for component in components if component in paths}
    with joining(models, name):
        for component, model in models.items():
            # PEFT shortens a list of paths to their ends, which may match more.
            exact_paths = "|".join(re.escape(path) for path in paths[component])
            listed = listed_fields(options.get("pattern", ""), paths[component], tensors)
            config = SpectralConfig(**options, **listed, target_modules=exact_paths, inference_mode=True)
            inject(model, config, name, list(paths[component]))
        with torch.inference_mode(False):
            load_adapter_state(models, name, tensors)
