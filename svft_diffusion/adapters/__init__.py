"""Adapters on live models: configuration, the PEFT tuner, loading, blending and saving.

Importing this package registers the tuner with PEFT.
"""

from svft_diffusion.adapters.config import SiVAConfig, SpectralConfig, SVDiffConfig, SVFTConfig, VectorFitConfig
from svft_diffusion.adapters.registration import register
from svft_diffusion.adapters.runtime import (
    load_adapter,
    loaded_adapters,
    save_adapter,
    swap_adapter,
    unload_adapter,
)
from svft_diffusion.adapters.targets import DEFAULT_PRESET, PRESETS
from svft_diffusion.adapters.tokens import add_tokens, token_parameters
from svft_diffusion.adapters.training import adapter_state, add_training_adapter, load_adapter_state
from svft_diffusion.adapters.tuner import SpectralModel
from svft_diffusion.adapters.weights import per_sample_adapters, set_adapters

register(SpectralConfig, SpectralModel)

__all__ = [
    "DEFAULT_PRESET",
    "PRESETS",
    "SVDiffConfig",
    "SVFTConfig",
    "SiVAConfig",
    "SpectralConfig",
    "VectorFitConfig",
    "adapter_state",
    "add_tokens",
    "add_training_adapter",
    "load_adapter",
    "load_adapter_state",
    "loaded_adapters",
    "per_sample_adapters",
    "save_adapter",
    "set_adapters",
    "swap_adapter",
    "token_parameters",
    "unload_adapter",
]
