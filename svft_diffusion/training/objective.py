"""The denoising objective with prior preservation (DreamBooth, arXiv 2208.12242, eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from svft_diffusion.data.dataset import keyed_generator
from svft_diffusion.models import Conditioning, LatentDistribution, ModelFamily


@dataclass(frozen=True)
class Randomness:
    """Everything random in one forward pass of B pictures."""

    posterior_noise: Tensor  # (B, C, H, W), draws latents from the VAE's posterior
    noise: Tensor  # (B, C, H, W), what is added
    timesteps: Tensor  # (B,), integers


@dataclass(frozen=True)
class Losses:
    """Mean squared errors; ``prior`` is None without prior preservation."""

    total: Tensor
    instance: Tensor
    prior: Tensor | None


def draw_randomness(
    seed: int, samples: Sequence[tuple[str, int]], like: Tensor, *, timestep_sampling: str, number_of_timesteps: int
) -> Randomness:
    """Noise and timesteps of each sample, from its kind and number in the run alone, whatever batch it is in.

    Args:
        like: latents (B, C, H, W), for shape and device.
    """
    noises, timesteps = [], []
    for kind, number in samples:
        generator = keyed_generator(seed, "noise", kind, number)
        noises.append(torch.randn((2, *like.shape[1:]), generator=generator))
        timesteps.append(_draw_timestep(generator, timestep_sampling, number_of_timesteps))
    posterior_noise, noise = torch.stack(noises, dim=1).to(like.device)
    return Randomness(posterior_noise, noise, torch.tensor(timesteps, device=like.device))


def _draw_timestep(generator: torch.Generator, timestep_sampling: str, number_of_timesteps: int) -> int:
    """``uniform``, or ``focused``: uniform for a quarter, else ``T sigmoid(0.6 + 0.8 n)`` with standard normal n."""
    if timestep_sampling == "uniform" or float(torch.rand((), generator=generator)) < 0.25:
        return int(torch.randint(number_of_timesteps, (), generator=generator))
    share = torch.sigmoid(0.6 + 0.8 * torch.randn((), generator=generator))
    return min(int(number_of_timesteps * share), number_of_timesteps - 1)


def denoising_losses(
    family: ModelFamily,
    latent_distribution: LatentDistribution,
    conditioning: Conditioning,
    randomness: Randomness,
    *,
    prior_loss_weight: float | None,
) -> Losses:
    """Losses of one forward pass.

    Args:
        prior_loss_weight: the second half of the batch are class pictures, and count so much; None: there are none.
    """
    latents = latent_distribution.sample(randomness.posterior_noise)
    noisy_latents = family.add_noise(latents, randomness.noise, randomness.timesteps)
    target = family.target(latents, randomness.noise, randomness.timesteps)
    prediction = family.predict(noisy_latents, randomness.timesteps, conditioning)
    errors = functional.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    if prior_loss_weight is None:
        return Losses(errors.mean(), errors.mean(), None)
    instance, prior = (half.mean() for half in errors.chunk(2))
    return Losses(instance + prior_loss_weight * prior, instance, prior)
