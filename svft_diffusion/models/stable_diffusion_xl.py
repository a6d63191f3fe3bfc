"""Stable Diffusion XL: two CLIP text encoders, and a U-Net that is told sizes (arXiv 2307.01952, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from svft_diffusion.models.family import PICTURE_SIZES, Conditioning
from svft_diffusion.models.latent_diffusion import (
    POOLED_TEXT,
    TEXT_STATES,
    LatentDiffusionFamily,
    penultimate_states,
)
from svft_diffusion.models.noise import DiffusionSchedule
from svft_diffusion.models.text import has_text_encoders


class StableDiffusionXLFamily(LatentDiffusionFamily):
    """Answers the training loop's questions for SDXL; see `ModelFamily` for what each method does."""

    name = "stable-diffusion-xl"
    denoiser = "unet"

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        super().__init__(pipeline, DiffusionSchedule(pipeline.scheduler))
        self.zeros_for_empty_prompt = bool(pipeline.config.force_zeros_for_empty_prompt)

    @staticmethod
    def fits(pipeline: DiffusionPipeline) -> bool:
        """Whether ``pipeline`` is of this family: text to image; the refiner lacks the first text encoder."""
        return (
            isinstance(pipeline, StableDiffusionXLPipeline)
            and has_text_encoders(pipeline, "text_encoder", "text_encoder_2")
            and pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels
        )

    def encode_text(self, component: str, token_ids: Tensor) -> Conditioning:
        return penultimate_states(getattr(self.pipeline, component), token_ids)

    def combine_text(self, encoded: Mapping[str, Conditioning]) -> Conditioning:
        first, second = encoded["text_encoder"], encoded["text_encoder_2"]
        states = torch.cat([first[TEXT_STATES], second[TEXT_STATES]], dim=-1)
        return {TEXT_STATES: states, POOLED_TEXT: second[POOLED_TEXT]}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        unet, dtype = self.pipeline.unet, self.denoiser_dtype
        prediction: Tensor = unet(
            noisy_latents.to(dtype),
            timesteps,
            encoder_hidden_states=conditioning[TEXT_STATES].to(dtype),
            added_cond_kwargs={
                "text_embeds": conditioning[POOLED_TEXT].to(dtype),
                # In float32: bfloat16 has no 1001.
                "time_ids": conditioning[PICTURE_SIZES],
            },
            return_dict=False,
        )[0]
        return prediction
