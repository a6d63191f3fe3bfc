"""Singular factors of weights, decomposed once and kept on disk, from the values that a checkpoint holds."""

from svft_diffusion.factors.location import (
    CACHE_SIZE_VARIABLE,
    CACHE_VARIABLE,
    cache_folder,
    configure_cache,
    default_cache_folder,
    use_cache,
)
from svft_diffusion.factors.parallel import cached_factors_of

__all__ = [
    "CACHE_SIZE_VARIABLE",
    "CACHE_VARIABLE",
    "cache_folder",
    "cached_factors_of",
    "configure_cache",
    "default_cache_folder",
    "use_cache",
]
