"""What the training loop needs of a base model: one small class per family answers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from diffusers import DiffusionPipeline
from torch import Tensor, nn

Conditioning = dict[str, Tensor]
"""What the denoiser knows of the prompts; the first dimension of every tensor counts prompts."""

TokenIds = dict[str, Tensor]
"""Prompts as the text encoders take them: component -> (B, tokens)."""

PICTURE_SIZES = "picture_sizes"
"""Key of the conditioning: the sizes (B, 6) of what is trained on, see `svft_diffusion.data.cutting.Cut`."""


@dataclass(frozen=True)
class LatentDistribution:
    """Normal distribution of pictures' latents as the denoiser sees them (scaled); both (B, C, H, W)."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Latents for standard normal ``noise`` of the same shape."""
        return self.mean + self.std * noise


class ModelFamily(Protocol):
    """The training loop knows a base model by this interface alone.

    Attributes:
        denoiser: the component of the pipeline that is trained first of all.
        number_of_timesteps: a timestep is a whole number below it; the higher, the more noise.
        prediction_type: ``epsilon`` (noise), ``v_prediction`` (velocity of diffusion), or ``flow`` (noise - picture).
        timestep_sampling: how the family's timesteps are drawn where the settings don't say.
        pixel_multiple: heights and widths of pictures must be multiples of it.
        max_sequence_length: tokens that a T5 encoder reads; None for families without one.
        guidance_scale: what the denoiser is told while it trains; None for those that are told nothing.
        zeros_for_empty_prompt: whether guidance compares with zeros, not with what is said of an empty prompt.
    """

    name: str
    pipeline: DiffusionPipeline
    denoiser: str
    number_of_timesteps: int
    prediction_type: str
    timestep_sampling: str
    pixel_multiple: int
    max_sequence_length: int | None
    guidance_scale: float | None
    zeros_for_empty_prompt: bool

    def adapted_models(self, train_text_encoder: bool) -> dict[str, nn.Module]:
        """The models that get an adapter, by the name of their component: the denoiser, and CLIP where asked for."""

    def token_ids(self, prompts: Sequence[str]) -> TokenIds:
        """Prompts as the text encoders' input."""

    def truncated_text(self, prompt: str) -> str:
        """The end of a prompt that is longer than any of the text encoders reads, or nothing."""

    def encode_text(self, component: str, token_ids: Tensor) -> Conditioning:
        """What one text encoder says of prompts (B, tokens); differentiable."""

    def combine_text(self, encoded: Mapping[str, Conditioning]) -> Conditioning:
        """Conditioning from what every text encoder says, by component; differentiable."""

    def encode_prompts(self, token_ids: TokenIds) -> Conditioning:
        """Both in one: conditioning of tokenized prompts; differentiable."""

    def encode_pictures(self, pixels: Tensor) -> LatentDistribution:
        """Latents of pictures (B, 3, H, W) in [-1, 1]."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents at ``timesteps`` (B,)."""

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """Power of the latents over that of the noise in noisy latents at ``timesteps`` (B,); (B,)."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict; shape of ``latents``."""

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction; shape of ``noisy_latents``."""
