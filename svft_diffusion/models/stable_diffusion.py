"""Stable Diffusion 1.x and 2.x, and models of their build: one CLIP text encoder and a U-Net on VAE latents."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor

from svft_diffusion.models.family import Conditioning
from svft_diffusion.models.latent_diffusion import TEXT_STATES, LatentDiffusionFamily, last_states
from svft_diffusion.models.noise import DiffusionSchedule
from svft_diffusion.models.text import has_text_encoders


class StableDiffusionFamily(LatentDiffusionFamily):
    """Answers the training loop's questions for SD 1.x and 2.x; see `ModelFamily` for what each method does."""

    name = "stable-diffusion"
    denoiser = "unet"

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        super().__init__(pipeline, DiffusionSchedule(pipeline.scheduler))

    @staticmethod
    def fits(pipeline: DiffusionPipeline) -> bool:
        """Whether ``pipeline`` is of this family: text to image, noise as the U-Net's only picture."""
        return (
            isinstance(pipeline, StableDiffusionPipeline)
            and has_text_encoders(pipeline, "text_encoder")
            and pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels
        )

    def encode_text(self, component: str, token_ids: Tensor) -> Conditioning:
        return last_states(getattr(self.pipeline, component), token_ids)

    def combine_text(self, encoded: Mapping[str, Conditioning]) -> Conditioning:
        return encoded["text_encoder"]

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        unet, dtype = self.pipeline.unet, self.denoiser_dtype
        prediction: Tensor = unet(
            noisy_latents.to(dtype),
            timesteps,
            encoder_hidden_states=conditioning[TEXT_STATES].to(dtype),
            return_dict=False,
        )[0]
        return prediction
