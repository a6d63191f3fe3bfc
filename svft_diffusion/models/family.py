"""What the training loop needs of a base model: one small class per family answers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from diffusers import DiffusionPipeline
from torch import Tensor, nn

Conditioning = dict[str, Tensor]
"""What the denoiser knows of the prompts; the first dimension of every tensor counts prompts."""


@dataclass(frozen=True)
class LatentDistribution:
    """Normal distribution of pictures' latents as the denoiser sees them (scaled); both (B, C, H, W)."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Latents for standard normal ``noise`` of the same shape."""
        return self.mean + self.std * noise


class ModelFamily(Protocol):
    """The training loop knows a base model by this interface alone."""

    name: str
    pipeline: DiffusionPipeline
    number_of_timesteps: int

    def adapted_models(self, train_text_encoder: bool) -> dict[str, nn.Module]:
        """The models that get an adapter, by the name of their component."""

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as the text encoder's input, (B, ...)."""

    def truncated_text(self, prompt: str) -> str:
        """The end of a prompt that is longer than the text encoder reads, or nothing."""

    def encode_prompts(self, token_ids: Tensor) -> Conditioning:
        """Conditioning of tokenized prompts; differentiable."""

    def encode_pictures(self, pixels: Tensor) -> LatentDistribution:
        """Latents of pictures (B, 3, H, W) in [-1, 1]."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents at ``timesteps`` (B,)."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict; shape of ``latents``."""

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction; shape of ``noisy_latents``."""
