"""The families of base models that can be trained."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from svft_diffusion.errors import UserError
from svft_diffusion.models.family import ModelFamily
from svft_diffusion.models.flux import FluxFamily
from svft_diffusion.models.stable_diffusion import StableDiffusionFamily
from svft_diffusion.models.stable_diffusion_3 import StableDiffusion3Family
from svft_diffusion.models.stable_diffusion_xl import StableDiffusionXLFamily


def family_of(
    pipeline: DiffusionPipeline, *, max_sequence_length: int | None = None, guidance_scale: float | None = None
) -> ModelFamily:
    """The family that a loaded base model belongs to.

    Args:
        max_sequence_length: tokens that a T5 encoder reads (default: as many as when the pipeline draws).
        guidance_scale: what a guidance-distilled denoiser is told while it trains (default: the family's).

    Raises:
        UserError: no family here can train it, or it has no use for one of the arguments.
    """
    family: ModelFamily
    if StableDiffusionFamily.fits(pipeline):
        family = StableDiffusionFamily(pipeline)
    elif StableDiffusionXLFamily.fits(pipeline):
        family = StableDiffusionXLFamily(pipeline)
    elif StableDiffusion3Family.fits(pipeline):
        family = StableDiffusion3Family(pipeline, max_sequence_length)
    elif FluxFamily.fits(pipeline):
        family = FluxFamily(pipeline, max_sequence_length, guidance_scale)
    else:
        raise UserError(
            f"a {type(pipeline).__name__} can't be trained; use a text-to-image model of the kinds Stable Diffusion "
            "1.x, 2.x, XL, 3.x or FLUX.1, with its text encoders and tokenizers"
        )
    if max_sequence_length is not None and family.max_sequence_length is None:
        raise UserError("--max_sequence_length has no effect on a base without a T5 text encoder; leave it out")
    if guidance_scale is not None and family.guidance_scale is None:
        raise UserError("--guidance_scale has no effect on a base that is not told one; leave it out")
    return family
