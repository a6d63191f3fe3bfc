"""Personalization of diffusion models by adapters in the singular-value space of their weights."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from svft_diffusion.version import __version__

if TYPE_CHECKING:
    from svft_diffusion.adapters import (
        SiVAConfig,
        SVDiffConfig,
        SVFTConfig,
        VectorFitConfig,
        add_tokens,
        load_adapter,
        per_sample_adapters,
        save_adapter,
        set_adapters,
        swap_adapter,
        unload_adapter,
    )
    from svft_diffusion.sampling.acting import acting_adapters
    from svft_diffusion.sampling.adapter_use import AdapterUse
    from svft_diffusion.sampling.regions import Region
    from svft_diffusion.sampling.step_schedule import StepSchedule

__all__ = [
    "AdapterUse",
    "Region",
    "SVDiffConfig",
    "SVFTConfig",
    "SiVAConfig",
    "StepSchedule",
    "VectorFitConfig",
    "__version__",
    "acting_adapters",
    "add_tokens",
    "load_adapter",
    "per_sample_adapters",
    "save_adapter",
    "set_adapters",
    "swap_adapter",
    "unload_adapter",
]


_OF_SAMPLING = {
    "AdapterUse": "adapter_use",
    "Region": "regions",
    "StepSchedule": "step_schedule",
    "acting_adapters": "acting",
}


def __getattr__(name: str) -> object:
    """Import a part, and with it PEFT, when it is first asked for: the package itself imports at once."""
    if name in _OF_SAMPLING:
        return getattr(import_module(f"svft_diffusion.sampling.{_OF_SAMPLING[name]}"), name)
    if name in __all__:
        return getattr(import_module("svft_diffusion.adapters"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
