"""FLUX.1 and models of its build: a pooled CLIP vector, the states of T5, and a flow transformer on packed latents."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor

from svft_diffusion.models.family import Conditioning
from svft_diffusion.models.latent_diffusion import (
    POOLED_TEXT,
    TEXT_STATES,
    LatentDiffusionFamily,
    last_states,
)
from svft_diffusion.models.noise import FlowSchedule
from svft_diffusion.models.text import has_text_encoders, sequence_length

PATCH_SIZE = 2
"""Height and width in latents of what is one token of the transformer."""

_GUIDANCE_SCALE = 3.5  # of diffusers' DreamBooth example


class FluxFamily(LatentDiffusionFamily):
    """Answers the training loop's questions for FLUX.1; see `ModelFamily` for what each method does."""

    name = "flux"
    denoiser = "transformer"

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        max_sequence_length: int | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        schedule = FlowSchedule(pipeline.scheduler)
        super().__init__(
            pipeline,
            schedule,
            timestep_sampling="logit_normal",
            patch_size=PATCH_SIZE,
            max_sequence_length=sequence_length(pipeline, max_sequence_length),
        )
        self._sigmas = schedule.sigmas
        if pipeline.transformer.config.guidance_embeds:
            self.guidance_scale = _GUIDANCE_SCALE if guidance_scale is None else guidance_scale

    @staticmethod
    def fits(pipeline: DiffusionPipeline) -> bool:
        """Whether ``pipeline`` is of this family: text to image, with both text encoders."""
        return (
            isinstance(pipeline, FluxPipeline)
            and has_text_encoders(pipeline, "text_encoder", "text_encoder_2")
            and pipeline.transformer.config.in_channels == PATCH_SIZE**2 * pipeline.vae.config.latent_channels
        )

    def encode_text(self, component: str, token_ids: Tensor) -> Conditioning:
        text_encoder = getattr(self.pipeline, component)
        if component == "text_encoder_2":
            return last_states(text_encoder, token_ids)
        return {POOLED_TEXT: text_encoder(token_ids.to(text_encoder.device)).pooler_output}

    def combine_text(self, encoded: Mapping[str, Conditioning]) -> Conditioning:
        return {**encoded["text_encoder"], **encoded["text_encoder_2"]}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        transformer, dtype = self.pipeline.transformer, self.denoiser_dtype
        _, _, height, width = noisy_latents.shape
        text = conditioning[TEXT_STATES].to(dtype)
        guidance = None
        if self.guidance_scale is not None:
            guidance = torch.full(timesteps.shape, self.guidance_scale, device=timesteps.device)
        prediction: Tensor = transformer(
            hidden_states=packed(noisy_latents).to(dtype),
            timestep=self._sigmas(timesteps),  # the transformer multiplies it by 1000
            guidance=guidance,
            pooled_projections=conditioning[POOLED_TEXT].to(dtype),
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=positions(height, width).to(text),
            return_dict=False,
        )[0]
        return unpacked(prediction, height, width)


def packed(latents: Tensor) -> Tensor:
    """(B, C, H, W) as tokens (B, H/2 * W/2, 4 C): patches row by row, the channels of a patch outermost."""
    patches = latents.unflatten(3, (-1, PATCH_SIZE)).unflatten(2, (-1, PATCH_SIZE))  # (B, C, H/2, 2, W/2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`, for latents of ``height`` x ``width``."""
    grid = tokens.unflatten(1, (height // PATCH_SIZE, width // PATCH_SIZE)).unflatten(3, (-1, PATCH_SIZE, PATCH_SIZE))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def positions(height: int, width: int) -> Tensor:
    """(H/2 * W/2, 3): zero, row and column of each token of latents of ``height`` x ``width``."""
    rows, columns = torch.arange(height // PATCH_SIZE), torch.arange(width // PATCH_SIZE)
    return torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), rows, columns).float()
