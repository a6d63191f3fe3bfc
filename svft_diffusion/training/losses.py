"""How much an error counts: by its size (squared or pseudo-Huber) and by the noise level it was made at (min-SNR)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LOSS_TYPES = ("l2", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")


@dataclass(frozen=True)
class LossSettings:
    """What a sample's loss is; the defaults are the plain mean squared error."""

    loss_type: str = "l2"
    huber_c: float = 0.1
    huber_schedule: str = "snr"
    snr_gamma: float | None = None


PLAIN_LOSS = LossSettings()


def elementwise_loss(prediction: Tensor, target: Tensor, loss_type: str, threshold: Tensor | None) -> Tensor:
    """Losses of the shape of ``prediction`` (B, ...).

    Scheduled pseudo-Huber loss (arXiv 2403.16728) with the factors of kohya-ss/sd-scripts: with error e and threshold
    c, ``huber`` is 2c (sqrt(e² + c²) - c), near e² where e is small; ``smooth_l1`` is 2 (sqrt(e² + c²) - c), near 2|e|
    where e is large.

    Args:
        threshold: c of each sample, (B,); None for ``l2``.
    """
    if loss_type == "l2":
        return functional.mse_loss(prediction, target, reduction="none")
    assert threshold is not None
    c = threshold.reshape(-1, *[1] * (prediction.dim() - 1))
    squared = (prediction - target) ** 2
    smooth = 2 * squared / (torch.sqrt(squared + c**2) + c)  # the same, where e is small not lost to rounding
    return c * smooth if loss_type == "huber" else smooth


def huber_threshold(timesteps: Tensor, signal_to_noise: Tensor, settings: LossSettings, last_timestep: int) -> Tensor:
    """The pseudo-Huber threshold c of each sample (arXiv 2403.16728, with the schedules of kohya-ss/sd-scripts).

    ``constant``: ``huber_c``. ``exponential``: from 1 without noise down to ``huber_c`` at ``last_timestep``. ``snr``:
    the same ends, by s = 1/sqrt(SNR) as (1 - huber_c) / (1 + s)² + huber_c.

    Args:
        timesteps: (B,).
        signal_to_noise: (B,).
    """
    if settings.huber_schedule == "constant":
        return torch.full_like(signal_to_noise, settings.huber_c)
    if settings.huber_schedule == "exponential":
        return torch.exp(math.log(settings.huber_c) / last_timestep * timesteps)
    return (1 - settings.huber_c) / (1 + signal_to_noise.rsqrt()) ** 2 + settings.huber_c


def min_snr_weight(signal_to_noise: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weight of each sample's loss, (B,): min-SNR-gamma (arXiv 2303.09556, section 3.4).

    min(SNR, gamma) weighs the error of the predicted picture. The same in terms of the noise (``epsilon``) is
    min(SNR, gamma) / SNR, and of the velocity (``v_prediction``) min(SNR, gamma) / (SNR + 1).
    """
    if prediction_type == "epsilon":
        return (gamma / signal_to_noise).clamp(max=1)  # as the formula, and 1 where the SNR is 0
    return signal_to_noise.clamp(max=gamma) / (signal_to_noise + 1)


def squared_norm(values: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all ``values``: an L2 penalty when added to a loss, and zero for the base model."""
    return torch.stack([value.float().square().sum() for value in values]).sum()
