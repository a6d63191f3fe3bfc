"""Adapters on live models: configuration, the PEFT tuner, loading, blending and saving.

Importing this package registers the tuner with PEFT.
"""

from svft_diffusion.adapters.config import SpectralConfig, SVDiffConfig, SVFTConfig
from svft_diffusion.adapters.registration import register
from svft_diffusion.adapters.runtime import (
    load_adapter,
    loaded_adapters,
    save_adapter,
    set_adapters,
    unload_adapter,
)
from svft_diffusion.adapters.targets import DEFAULT_PRESET, PRESETS
from svft_diffusion.adapters.training import adapter_state, add_training_adapter, load_adapter_state

register()

__all__ = [
    "DEFAULT_PRESET",
    "PRESETS",
    "SVDiffConfig",
    "SVFTConfig",
    "SpectralConfig",
    "adapter_state",
    "add_training_adapter",
    "load_adapter",
    "load_adapter_state",
    "loaded_adapters",
    "save_adapter",
    "set_adapters",
    "unload_adapter",
]
