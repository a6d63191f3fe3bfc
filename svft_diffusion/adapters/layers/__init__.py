"""The layer that adapters live in: kinds of modules, and the ways to compute with adapters in them."""

from svft_diffusion.adapters.layers.kinds import Kind, layer_kind, matrix_of
from svft_diffusion.adapters.layers.layer import SpectralLayer

__all__ = ["Kind", "SpectralLayer", "layer_kind", "matrix_of"]
