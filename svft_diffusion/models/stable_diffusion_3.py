"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two CLIP text encoders, T5 where it is loaded, a flow transformer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from svft_diffusion.models.family import Conditioning
from svft_diffusion.models.latent_diffusion import (
    POOLED_TEXT,
    TEXT_STATES,
    LatentDiffusionFamily,
    last_states,
    padded_to,
    penultimate_states,
)
from svft_diffusion.models.noise import FlowSchedule
from svft_diffusion.models.text import has_text_encoders, sequence_length


class StableDiffusion3Family(LatentDiffusionFamily):
    """Answers the training loop's questions for SD 3.x; see `ModelFamily` for what each method does."""

    name = "stable-diffusion-3"
    denoiser = "transformer"

    def __init__(self, pipeline: DiffusionPipeline, max_sequence_length: int | None = None) -> None:
        schedule = FlowSchedule(pipeline.scheduler)
        super().__init__(
            pipeline,
            schedule,
            timestep_sampling="logit_normal",
            patch_size=pipeline.transformer.config.patch_size,
            max_sequence_length=sequence_length(pipeline, max_sequence_length),
        )
        self._sigmas = schedule.sigmas

    @staticmethod
    def fits(pipeline: DiffusionPipeline) -> bool:
        """Whether ``pipeline`` is of this family, with what diffusers itself needs to read a prompt: both CLIPs."""
        return isinstance(pipeline, StableDiffusion3Pipeline) and has_text_encoders(
            pipeline, "text_encoder", "text_encoder_2"
        )

    def encode_text(self, component: str, token_ids: Tensor) -> Conditioning:
        encode = last_states if component == "text_encoder_3" else penultimate_states
        return encode(getattr(self.pipeline, component), token_ids)

    def combine_text(self, encoded: Mapping[str, Conditioning]) -> Conditioning:
        """The states of the CLIPs side by side, then those of T5; without T5 zeros in their place, as in sampling."""
        clips = [encoded["text_encoder"], encoded["text_encoder_2"]]
        width = self.pipeline.transformer.config.joint_attention_dim
        states = padded_to(width, torch.cat([clip[TEXT_STATES] for clip in clips], dim=-1))
        if "text_encoder_3" in encoded:
            long_states = encoded["text_encoder_3"][TEXT_STATES].to(states.dtype)
        else:
            assert self.max_sequence_length is not None
            long_states = states.new_zeros(len(states), self.max_sequence_length, width)
        return {
            TEXT_STATES: torch.cat([states, long_states], dim=1),
            POOLED_TEXT: torch.cat([clip[POOLED_TEXT] for clip in clips], dim=-1),
        }

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        transformer, dtype = self.pipeline.transformer, self.denoiser_dtype
        prediction: Tensor = transformer(
            hidden_states=noisy_latents.to(dtype),
            timestep=self._sigmas(timesteps) * self.number_of_timesteps,
            encoder_hidden_states=conditioning[TEXT_STATES].to(dtype),
            pooled_projections=conditioning[POOLED_TEXT].to(dtype),
            return_dict=False,
        )[0]
        return prediction
