"""What all families share: pictures are latents of a VAE, and prompts go through tokenizers and text encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, T5EncoderModel

from svft_diffusion.models.family import Conditioning, LatentDistribution, TokenIds
from svft_diffusion.models.noise import NoiseSchedule
from svft_diffusion.models.text import text_readers, truncated_text

TEXT_STATES = "text_states"
"""Key of the conditioning: hidden states of the prompts' tokens, (B, tokens, width)."""

POOLED_TEXT = "pooled_text"
"""Key of the conditioning: one vector for each prompt, (B, width)."""


class LatentDiffusionFamily(ABC):
    """The part of `ModelFamily` that is alike everywhere; see there for what each method does."""

    name: str
    denoiser: str
    """Component of the pipeline that is trained first of all."""

    guidance_scale: float | None = None
    zeros_for_empty_prompt = False

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        schedule: NoiseSchedule,
        *,
        timestep_sampling: str = "uniform",
        patch_size: int = 1,
        max_sequence_length: int | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.schedule = schedule
        self.number_of_timesteps = schedule.number_of_timesteps
        self.prediction_type = schedule.prediction_type
        self.timestep_sampling = timestep_sampling
        self.pixel_multiple = int(pipeline.vae_scale_factor) * patch_size
        self.max_sequence_length = max_sequence_length

    @property
    def denoiser_dtype(self) -> torch.dtype:
        """What the denoiser takes. Its own ``dtype`` goes through all modules each time, milliseconds if adapted."""
        parameters = getattr(self.pipeline, self.denoiser).parameters()
        return next(parameter.dtype for parameter in parameters if parameter.is_floating_point())

    def adapted_models(self, train_text_encoder: bool) -> dict[str, nn.Module]:
        models: dict[str, nn.Module] = {self.denoiser: getattr(self.pipeline, self.denoiser)}
        if train_text_encoder:
            models |= {name: model for name, model in self._text_encoders().items() if not _is_t5(model)}
        return models

    def token_ids(self, prompts: Sequence[str]) -> TokenIds:
        """Padded to the length that each text encoder reads, as in sampling."""
        ids: TokenIds = {}
        for component, reader in text_readers(self.pipeline, self.max_sequence_length).items():
            encoded = reader.tokenizer(
                list(prompts), padding="max_length", max_length=reader.length, truncation=True, return_tensors="pt"
            )
            ids[component] = encoded.input_ids
        return ids

    def truncated_text(self, prompt: str) -> str:
        return truncated_text(self.pipeline, prompt, self.max_sequence_length)

    @abstractmethod
    def encode_text(self, component: str, token_ids: Tensor) -> Conditioning:
        """See `ModelFamily`."""

    @abstractmethod
    def combine_text(self, encoded: Mapping[str, Conditioning]) -> Conditioning:
        """See `ModelFamily`."""

    def encode_prompts(self, token_ids: TokenIds) -> Conditioning:
        return self.combine_text({component: self.encode_text(component, ids) for component, ids in token_ids.items()})

    def encode_pictures(self, pixels: Tensor) -> LatentDistribution:
        vae = self.pipeline.vae
        with torch.no_grad():
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        factor, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        return LatentDistribution((posterior.mean - shift) * factor, posterior.std * factor)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.add_noise(latents, noise, timesteps)

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        return self.schedule.signal_to_noise(timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.target(latents, noise, timesteps)

    def _text_encoders(self) -> dict[str, nn.Module]:
        return {name: getattr(self.pipeline, name) for name in text_readers(self.pipeline, self.max_sequence_length)}


def penultimate_states(text_encoder: PreTrainedModel, token_ids: Tensor) -> Conditioning:
    """States before the last layer of a CLIP text encoder, and its pooled vector if it projects one."""
    output = text_encoder(token_ids.to(text_encoder.device), output_hidden_states=True)
    encoded = {TEXT_STATES: output.hidden_states[-2]}
    if "text_embeds" in output:
        encoded[POOLED_TEXT] = output.text_embeds
    return encoded


def last_states(text_encoder: PreTrainedModel, token_ids: Tensor) -> Conditioning:
    """States after the last layer of a text encoder."""
    return {TEXT_STATES: text_encoder(token_ids.to(text_encoder.device))[0]}


def padded_to(width: int, states: Tensor) -> Tensor:
    """``states`` (..., C) with zeros up to ``width``."""
    return functional.pad(states, (0, width - states.shape[-1]))


def _is_t5(model: nn.Module) -> bool:
    return isinstance(model, T5EncoderModel)
