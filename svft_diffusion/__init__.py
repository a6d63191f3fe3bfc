"""Personalization of diffusion models by adapters in the singular-value space of their weights."""

from __future__ import annotations

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

__all__ = [
    "SVDiffConfig",
    "SVFTConfig",
    "SiVAConfig",
    "VectorFitConfig",
    "__version__",
    "add_tokens",
    "load_adapter",
    "per_sample_adapters",
    "save_adapter",
    "set_adapters",
    "swap_adapter",
    "unload_adapter",
]


def __getattr__(name: str) -> object:
    """Import the adapters, and with them PEFT, when they are first asked for: the package itself imports at once."""
    if name in __all__:
        from svft_diffusion import adapters

        return getattr(adapters, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
