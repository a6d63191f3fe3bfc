"""Stable Diffusion 1.x and 2.x, and models of their build: one CLIP text encoder and a U-Net on VAE latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor, nn

from svft_diffusion.errors import UserError
from svft_diffusion.models.family import Conditioning, LatentDistribution
from svft_diffusion.models.loading import truncated_text

TEXT_STATES = "text_states"
"""Key of the conditioning: hidden states of the prompts' tokens, (B, tokens, width)."""


class StableDiffusionFamily:
    """Answers the training loop's questions for SD 1.x and 2.x; see `ModelFamily` for what each method does."""

    name = "stable-diffusion"

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline
        # Only the betas and the prediction type matter here; samplers of every kind carry the same ones.
        self._schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.number_of_timesteps = int(self._schedule.config.num_train_timesteps)
        if self._schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction type {self._schedule.config.prediction_type!r} of the base can't be trained")

    @staticmethod
    def fits(pipeline: DiffusionPipeline) -> bool:
        """Whether ``pipeline`` is of this family: text to image, noise as the U-Net's only picture."""
        return isinstance(pipeline, StableDiffusionPipeline) and (
            pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels
        )

    def adapted_models(self, train_text_encoder: bool) -> dict[str, nn.Module]:
        models: dict[str, nn.Module] = {"unet": self.pipeline.unet}
        if train_text_encoder:
            models["text_encoder"] = self.pipeline.text_encoder
        return models

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """(B, tokens) padded to the tokenizer's length, as in sampling."""
        tokenizer = self.pipeline.tokenizer
        encoded = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = encoded.input_ids
        return ids

    def truncated_text(self, prompt: str) -> str:
        return truncated_text(self.pipeline, prompt)

    def encode_prompts(self, token_ids: Tensor) -> Conditioning:
        text_encoder = self.pipeline.text_encoder
        return {TEXT_STATES: text_encoder(token_ids.to(text_encoder.device))[0]}

    def encode_pictures(self, pixels: Tensor) -> LatentDistribution:
        vae = self.pipeline.vae
        with torch.no_grad():
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        factor = vae.config.scaling_factor
        return LatentDistribution(posterior.mean * factor, posterior.std * factor)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy: Tensor = self._schedule.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self._schedule.config.prediction_type == "epsilon":
            return noise
        velocity: Tensor = self._schedule.get_velocity(latents, noise, timesteps)
        return velocity

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        unet = self.pipeline.unet
        prediction: Tensor = unet(
            noisy_latents.to(unet.dtype),
            timesteps,
            encoder_hidden_states=conditioning[TEXT_STATES].to(unet.dtype),
            return_dict=False,
        )[0]
        return prediction
