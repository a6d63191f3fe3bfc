"""Base models: finding and loading them, and what training needs of each family."""

from svft_diffusion.models.families import family_of
from svft_diffusion.models.family import PICTURE_SIZES, Conditioning, LatentDistribution, ModelFamily, TokenIds
from svft_diffusion.models.loading import (
    EMBEDDED_MODEL,
    base_display_name,
    default_resolution,
    hub_name,
    load_pipeline,
    resolve_base,
)
from svft_diffusion.models.text import truncated_text
from svft_diffusion.models.vae import resolve_vae

__all__ = [
    "EMBEDDED_MODEL",
    "PICTURE_SIZES",
    "Conditioning",
    "LatentDistribution",
    "ModelFamily",
    "TokenIds",
    "base_display_name",
    "default_resolution",
    "family_of",
    "hub_name",
    "load_pipeline",
    "resolve_base",
    "resolve_vae",
    "truncated_text",
]
