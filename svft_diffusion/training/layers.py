"""Which layers of a loaded base model carry the adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from svft_diffusion.adapters import SpectralConfig
from svft_diffusion.adapters.targets import named_layers
from svft_diffusion.adapters.tuner import layer_options, layers_to_adapt
from svft_diffusion.training.checks import adapter_config
from svft_diffusion.training.config import TrainingConfig


def adapter_of_models(config: TrainingConfig, models: Mapping[str, nn.Module]) -> SpectralConfig:
    """The adapter that the settings ask for, on these models. Raises `UserError` for names of no layer."""
    wanted = adapter_config(config)
    if config.target_layers is not None:
        paths = named_layers(models, config.names_of_target_layers, norms=bool(config.train_norm))
        wanted.target_modules = "|".join(re.escape(path) for path in paths)  # a pattern: sets of names match ends
    return wanted


def check_layers(config: TrainingConfig, models: Mapping[str, nn.Module]) -> None:
    """Raise `UserError` if a layer can't carry the adapter: better before class images are drawn than after."""
    wanted = adapter_of_models(config, models)
    vectors = 0
    for model in models.values():
        for path in layers_to_adapt(model, wanted):
            options, _ = layer_options(model.get_submodule(path), path, wanted)
            vectors += len(options.parts)
    if config.freezing is not None:
        config.freezing.number_frozen(vectors)
