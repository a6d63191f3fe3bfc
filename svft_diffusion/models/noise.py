"""How noise is mixed into latents, and what the denoiser should answer: by the scheduler that the base brings along."""

from __future__ import annotations

from typing import Any, Protocol

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from svft_diffusion.errors import UserError

_BETAS = ("beta_start", "beta_end", "beta_schedule")


class NoiseSchedule(Protocol):
    """Timesteps are whole numbers below ``number_of_timesteps``; the higher, the more noise."""

    number_of_timesteps: int
    prediction_type: str  # epsilon, v_prediction or flow

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents at ``timesteps`` (B,)."""

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """Power of the latents over that of the noise at ``timesteps`` (B,); (B,)."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict; shape of ``latents``."""


class DiffusionSchedule:
    """Denoising diffusion by the betas of a scheduler; the target is the noise or the velocity.

    Args:
        scheduler: of any kind that samples such models: they all carry the betas and the prediction type.

    Raises:
        UserError: the base is made for something else.
    """

    def __init__(self, scheduler: Any) -> None:
        if not all(name in scheduler.config for name in _BETAS):
            raise UserError(
                f"the base's scheduler {type(scheduler).__name__} is none of denoising diffusion, such as "
                "DDPMScheduler; use a base with the scheduler of its training"
            )
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.number_of_timesteps = int(self.scheduler.config.num_train_timesteps)
        self.prediction_type = str(self.scheduler.config.prediction_type)
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction type {self.prediction_type!r} of the base can't be trained")

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy: Tensor = self.scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        signal = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return signal / (1 - signal)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        velocity: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
        return velocity


class FlowSchedule:
    """Rectified flow: ``(1 - sigma) latents + sigma noise``, and the target is the way from one to the other.

    Args:
        scheduler: one for flow matching; its table of sigmas is shifted towards noise where its settings say so.

    Raises:
        UserError: it is another.
    """

    prediction_type = "flow"

    def __init__(self, scheduler: Any) -> None:
        if "shift" not in scheduler.config:
            raise UserError(
                f"the base's scheduler {type(scheduler).__name__} is none of flow matching, such as "
                "FlowMatchEulerDiscreteScheduler; use a base with the scheduler of its training"
            )
        table = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.number_of_timesteps = int(table.config.num_train_timesteps)
        self._sigmas = table.sigmas.flip(0)  # from little noise to much

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """Part of noise at ``timesteps`` (B,), in (0, 1]."""
        return self._sigmas.to(timesteps.device)[timesteps]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigmas = self.sigmas(timesteps).reshape(-1, *[1] * (latents.ndim - 1))
        return (1 - sigmas) * latents + sigmas * noise

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        sigmas = self.sigmas(timesteps)
        return ((1 - sigmas) / sigmas) ** 2

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents
