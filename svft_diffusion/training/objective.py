"""The denoising objective with prior preservation (DreamBooth, arXiv 2208.12242, eq. 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svft_diffusion.data.order import keyed_generator
from svft_diffusion.models import Conditioning, LatentDistribution, ModelFamily
from svft_diffusion.training.losses import PLAIN_LOSS, LossSettings, elementwise_loss, huber_threshold, min_snr_weight


@dataclass(frozen=True)
class Randomness:
    """Everything random in one forward pass of B pictures."""

    posterior_noise: Tensor  # (B, C, H, W), draws latents from the VAE's posterior
    noise: Tensor  # (B, C, H, W), what the target is made of
    timesteps: Tensor  # (B,), integers
    perturbed_noise: Tensor | None = None  # (B, C, H, W), added in place of ``noise`` where inputs are perturbed


@dataclass(frozen=True)
class Losses:
    """Means over samples; ``prior`` is None without prior preservation."""

    total: Tensor
    instance: Tensor
    prior: Tensor | None
    samples: Tensor  # (B,), each sample's own, before any weight; detached
    unmix: Tensor | None = None  # see `unmix`; before its weight


def draw_randomness(
    seed: int,
    samples: Sequence[tuple[str, int]],
    like: Tensor,
    *,
    timestep_sampling: str,
    number_of_timesteps: int,
    noise_offset: float = 0.0,
    input_perturbation: float = 0.0,
) -> Randomness:
    """Noise and timesteps of each sample, from its kind and number in the run alone, whatever batch it is in.

    Args:
        like: latents (B, C, H, W), for shape and device.
        noise_offset: share of noise that is constant over a channel, from which pictures learn to be all dark or all
            bright (N. Guttenberg, "Diffusion with Offset Noise", CrossLabs 2023).
        input_perturbation: share of a second noise in the denoiser's input that the target knows nothing of
            (arXiv 2301.11706).
    """
    noises, timesteps, perturbed = [], [], []
    for kind, number in samples:
        generator = keyed_generator(seed, "noise", kind, number)
        posterior_noise, noise = torch.randn((2, *like.shape[1:]), generator=generator)
        timesteps.append(_draw_timestep(generator, timestep_sampling, number_of_timesteps))
        # Drawn last, and always: no option changes the random numbers of another.
        offset = torch.randn((like.shape[1], 1, 1), generator=generator)
        perturbation = torch.randn(like.shape[1:], generator=generator)
        noise = noise + noise_offset * offset
        noises.append(torch.stack((posterior_noise, noise)))
        perturbed.append(noise + input_perturbation * perturbation)
    posterior_noise, noise = torch.stack(noises, dim=1).to(like.device)
    return Randomness(
        posterior_noise,
        noise,
        torch.tensor(timesteps, device=like.device),
        torch.stack(perturbed).to(like.device) if input_perturbation else None,
    )


def _draw_timestep(generator: torch.Generator, timestep_sampling: str, number_of_timesteps: int) -> int:
    """By name, with standard normal n; ``logit_normal`` is that of SD 3 (arXiv 2403.03206, section 3.1).

    ``uniform``; ``focused``: uniform for a quarter, else T sigmoid(0.6 + 0.8 n); ``logit_normal``: T sigmoid(n).
    """
    if timestep_sampling == "logit_normal":
        share = torch.sigmoid(torch.randn((), generator=generator))
    elif timestep_sampling == "uniform" or float(torch.rand((), generator=generator)) < 0.25:
        return int(torch.randint(number_of_timesteps, (), generator=generator))
    else:
        share = torch.sigmoid(0.6 + 0.8 * torch.randn((), generator=generator))
    return min(int(number_of_timesteps * share), number_of_timesteps - 1)


def denoising_losses(
    family: ModelFamily,
    latent_distribution: LatentDistribution,
    conditioning: Conditioning,
    randomness: Randomness,
    *,
    prior_loss_weight: float | None,
    settings: LossSettings = PLAIN_LOSS,
    weights: Tensor | None = None,
    base_prediction: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Losses:
    """Losses of one forward pass.

    Args:
        prior_loss_weight: the second half of the batch are class pictures, and count so much; None: there are none.
        weights: (B, 1, H, W), of the error in each place.
        base_prediction: the target of the second half, from its noisy latents and timesteps; see `base_prediction` in
            `svft_diffusion.training.prior`.
    """
    latents = latent_distribution.sample(randomness.posterior_noise)
    added = randomness.noise if randomness.perturbed_noise is None else randomness.perturbed_noise
    noisy_latents = family.add_noise(latents, added, randomness.timesteps)
    target = family.target(latents, randomness.noise, randomness.timesteps)
    if base_prediction is not None:
        half = len(noisy_latents) // 2
        of_base = base_prediction(noisy_latents[half:], randomness.timesteps[half:])
        target = torch.cat((target[:half].float(), of_base.float()))
    prediction = family.predict(noisy_latents, randomness.timesteps, conditioning)
    errors = _sample_losses(family, prediction.float(), target.float(), randomness.timesteps, settings, weights)
    samples = errors.detach()
    if settings.snr_gamma is not None:
        # Each sample by its own noise level: those of the second half are the class pictures'.
        signal_to_noise = family.signal_to_noise(randomness.timesteps)
        errors = errors * min_snr_weight(signal_to_noise, settings.snr_gamma, family.prediction_type)
    if prior_loss_weight is None:
        return Losses(errors.mean(), errors.mean(), None, samples)
    instance, prior = (half.mean() for half in errors.chunk(2))
    return Losses(instance + prior_loss_weight * prior, instance, prior, samples)


def _sample_losses(
    family: ModelFamily,
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    settings: LossSettings,
    weights: Tensor | None,
) -> Tensor:
    """(B,)."""
    threshold = None
    if settings.loss_type != "l2":
        signal_to_noise = family.signal_to_noise(timesteps)
        threshold = huber_threshold(timesteps, signal_to_noise, settings, family.number_of_timesteps)
    errors = elementwise_loss(prediction, target, settings.loss_type, threshold)
    return (errors if weights is None else weights * errors).mean(dim=(1, 2, 3))
