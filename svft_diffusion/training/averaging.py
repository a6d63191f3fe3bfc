"""Averaged values: what samples and adapter files hold where the optimizer's own values are not the result.

Either an exponential moving average over steps (`MovingAverage`) or the average inside a schedule-free optimizer
(`ScheduleFreeAverage`). Both leave the values that train untouched by a bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from svft_diffusion.errors import UserError
from svft_diffusion.training.config import TrainingConfig


class Averaging(ABC):
    """Averages of some parameters, by name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered, the parameters hold their averages; after it, exactly what they held before."""
        trained = self._copies()
        averages = self._averages()
        try:
            self._put(averages)
            yield
        finally:
            self._put(trained)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside an adapter file with the averages: tensors and plain values only."""
        return {"trained": self._copies(), "average": self._average_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`: the parameters hold what trained, not the averages.

        Raises:
            UserError: the state is that of other parameters.
        """
        if state["trained"].keys() != self._parameters.keys():
            raise UserError("the saved average is of other values than those that train")
        self._put(state["trained"])
        self._load_average_state(state["average"])

    def _copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    @abstractmethod
    def _averages(self) -> Mapping[str, Tensor]:
        """The averages by name; the parameters may hold anything afterwards."""

    @abstractmethod
    def _average_state(self) -> dict[str, Any]:
        """What is not in the optimizer's state."""

    @abstractmethod
    def _load_average_state(self, state: dict[str, Any]) -> None:
        """Take over what `_average_state` gave."""


class MovingAverage(Averaging):
    """Exponential moving average over the steps of ``optimizer``, in float32 as the values are.

    The decay is at most (1 + n) / (10 + n) in step n, so that the average is over about the last tenth of the run and
    holds nothing of the start.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(parameters)
        self._average = EMAModel(self._parameters.values(), decay=decay)
        # A hook: steps that a gradient scaler leaves out don't count.
        optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._average.step(self._parameters.values())

    def _averages(self) -> Mapping[str, Tensor]:
        return dict(zip(self._parameters, self._average.shadow_params, strict=True))

    def _average_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._average.state_dict()
        return state

    def _load_average_state(self, state: dict[str, Any]) -> None:
        self._average.load_state_dict(state)
        self._average.to(next(iter(self._parameters.values())).device)


class ScheduleFreeAverage(Averaging):
    """The average that a schedule-free optimizer keeps in its own state (arXiv 2405.15682)."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
        super().__init__(parameters)
        self._optimizer = optimizer

    def _averages(self) -> Mapping[str, Tensor]:
        self._optimizer.eval()  # writes the averages into the parameters
        averages = self._copies()
        self._optimizer.train()  # back again, but for rounding
        return averages

    def _average_state(self) -> dict[str, Any]:
        return {}

    def _load_average_state(self, state: dict[str, Any]) -> None:
        del state  # the optimizer has loaded its own


def make_averaging(
    config: TrainingConfig, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Averaging | None:
    """The averaging that the settings ask for, if any.

    Args:
        optimizer: the one that takes the steps, not accelerate's around it.
    """
    if config.resolved_optimizer == "schedulefree":
        return ScheduleFreeAverage(parameters, optimizer)
    return MovingAverage(parameters, config.ema_decay, optimizer) if config.use_ema else None
