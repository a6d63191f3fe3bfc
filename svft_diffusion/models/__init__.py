"""Base models: finding and loading them, and what training needs of each family."""

from svft_diffusion.models.families import family_of
from svft_diffusion.models.family import Conditioning, LatentDistribution, ModelFamily
from svft_diffusion.models.loading import (
    EMBEDDED_MODEL,
    base_display_name,
    default_resolution,
    hub_name,
    load_pipeline,
    resolve_base,
    truncated_text,
)

__all__ = [
    "EMBEDDED_MODEL",
    "Conditioning",
    "LatentDistribution",
    "ModelFamily",
    "base_display_name",
    "default_resolution",
    "family_of",
    "hub_name",
    "load_pipeline",
    "resolve_base",
    "truncated_text",
]
