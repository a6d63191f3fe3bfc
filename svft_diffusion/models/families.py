"""Which family a base model belongs to. A new family is a module beside this one and a row here."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from svft_diffusion.errors import UserError
from svft_diffusion.models.family import ModelFamily
from svft_diffusion.models.stable_diffusion import StableDiffusionFamily

FAMILIES = (StableDiffusionFamily,)


def family_of(pipeline: DiffusionPipeline) -> ModelFamily:
    """The family that a loaded base model belongs to.

    Raises:
        UserError: no family here can train it.
    """
    for family in FAMILIES:
        if family.fits(pipeline):
            return family(pipeline)
    raise UserError(f"a {type(pipeline).__name__} can't be trained yet; use a Stable Diffusion 1.x or 2.x model")
