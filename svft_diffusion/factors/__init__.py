"""Singular factors of weights, decomposed once and kept on disk."""

from svft_diffusion.factors.cache import FactorCache, cached_factors, default_cache_folder

__all__ = ["FactorCache", "cached_factors", "default_cache_folder"]
