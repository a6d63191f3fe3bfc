"""Adaptive vector freezing: the vectors that trained most rest for a while, so that the others catch up.

After VectorFit (arXiv 2503.19530). The paper publishes no code; from it are the idea and the parameters: a score of how
far each vector (the shifts of one layer's singular values, or one bias) has moved, its moving average, a warm-up,
windows of fixed length in which the ``top_k`` strongest vectors are frozen, and the number of such windows. Ours are
the exact score (mean absolute distance from the start, see `svft_diffusion.spectral.vectorfit`), the smoothing of 0.99,
that all vectors train after the last window, and every default.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from svft_diffusion.errors import UserError
from svft_diffusion.spectral import smoothed_strength, strongest_vectors, training_strength

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FreezingSettings:
    """When vectors freeze and how many.

    Attributes:
        warmup_steps: optimizer steps before the first freezing; every vector trains.
        interval: optimizer steps of a window; the next freezing chooses anew.
        top_k: vectors that are frozen at a time; None for a fifth of them, rounded up.
        number_of_freezings: windows; after the last one every vector trains again.
        smoothing: beta of the strengths' moving average, in [0, 1); 0 ranks by the latest strength alone.

    Raises:
        UserError: a number outside its range.
    """

    warmup_steps: int = 60
    interval: int = 20
    top_k: int | None = None
    number_of_freezings: int = 10
    smoothing: float = 0.99

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "interval", "top_k", "number_of_freezings"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"adaptive vector freezing: {name} must be at least 1, got {value}")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"adaptive vector freezing: smoothing must be at least 0 and below 1, got {self.smoothing}")

    @property
    def last_step(self) -> int:
        """The step after which every vector trains again."""
        return self.warmup_steps + self.number_of_freezings * self.interval

    def number_frozen(self, number_of_vectors: int) -> int:
        """How many of so many vectors are frozen at a time. Raises `UserError` if that were all of them."""
        number = self.top_k or math.ceil(number_of_vectors / 5)
        if number >= number_of_vectors:
            raise UserError(
                f"adaptive vector freezing: top_k={number} freezes all {number_of_vectors} vectors that train at once; "
                "choose a smaller top_k, adapt more layers, or train without freezing"
            )
        return number

    def starts_window(self, finished_steps: int) -> bool:
        """Whether a window begins once so many optimizer steps are done."""
        since_warmup = finished_steps - self.warmup_steps
        return since_warmup >= 0 and since_warmup % self.interval == 0 and finished_steps < self.last_step


@dataclass(frozen=True)
class FreezingWindow:
    """One line of the log: which vectors rest after ``step`` optimizer steps, up to and including step ``until``."""

    step: int
    until: int
    frozen: dict[str, float]  # smoothed strength by name, the strongest first


class AdaptiveVectorFreezing:
    """Freezes the strongest of some vectors in turns, in whatever loop trains them.

    A frozen vector has no gradient when the optimizer steps. So it does not move at all: torch's optimizers pass over
    a parameter without gradient, their moments, step counts and decoupled weight decay included. ``requires_grad`` is
    left alone; nothing that sets it (``set_adapter``, ``enable_adapters``) ends a freezing, and distributed training
    sees the same graph in every step.

    Args:
        vectors: what trains, by name, in the same order in every process.
        settings: when and how many.

    Raises:
        UserError: ``top_k`` would freeze every vector.
    """

    def __init__(self, vectors: Mapping[str, nn.Parameter], settings: FreezingSettings) -> None:
        self.settings = settings
        self.log: list[FreezingWindow] = []
        self._vectors = dict(vectors)
        self._top_k = settings.number_frozen(len(self._vectors))
        self._initial = {name: vector.detach().clone() for name, vector in self._vectors.items()}
        self._finished_steps = 0
        self._strengths = torch.zeros(len(self._vectors))  # smoothed, in the order of the vectors
        self._frozen: list[str] = []
        self._attached = False

    @property
    def frozen(self) -> list[str]:
        """Names of the vectors that rest now, the strongest first."""
        return list(self._frozen)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let every step of ``optimizer``, or of the one that accelerate wrapped, drive the schedule.

        Batches whose gradients only accumulate, and steps that a gradient scaler leaves out, are not counted.

        Raises:
            UserError: the optimizer lacks one of the vectors, or freezing is attached already.
        """
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        if self._attached:
            raise UserError("adaptive vector freezing is attached already; make another one for another optimizer")
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, vector in self._vectors.items() if id(vector) not in known]
        if missing:
            raise UserError(
                f"adaptive vector freezing: the optimizer does not train {missing[0]} (of {len(missing)}); "
                "give it all the vectors"
            )
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        self._attached = True

    def drop_gradients(self) -> None:
        """Forget the gradients of the frozen vectors.

        The optimizer's hook does this in any case; before gradients are clipped or sent, it keeps those of frozen
        vectors out of the norm and off the wire.
        """
        for name in self._frozen:
            self._vectors[name].grad = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: tensors and plain values only."""
        return {
            "finished_steps": self._finished_steps,
            "initial": dict(self._initial),
            "strengths": self._strengths,
            "frozen": list(self._frozen),
            "log": [dataclasses.asdict(window) for window in self.log],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            UserError: the state is that of other vectors.
        """
        if list(state["initial"]) != list(self._vectors):
            different = sorted(self._vectors.keys() ^ state["initial"].keys())
            what = f", such as {different[0]}" if different else " in another order"
            raise UserError(f"adaptive vector freezing: the saved state is of other vectors{what}")
        self._finished_steps = state["finished_steps"]
        self._initial = {name: state["initial"][name].to(vector.device) for name, vector in self._vectors.items()}
        self._strengths = state["strengths"].clone()
        self._frozen = list(state["frozen"])
        self.log = [FreezingWindow(**window) for window in state["log"]]

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.drop_gradients()
        # A closure computes gradients inside the step, after this hook: frozen ones go before the optimizer sees them.
        return tuple(map(self._without_frozen, args)), {
            key: self._without_frozen(value) for key, value in kwargs.items()
        }

    def _without_frozen(self, argument: Any) -> Any:
        if isinstance(argument, torch.optim.Optimizer) or not callable(argument):
            return argument

        def closure() -> Any:
            loss = argument()
            self.drop_gradients()
            return loss

        return closure

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._finished_steps += 1
        if self._finished_steps > self.settings.last_step:
            return
        self._update_strengths()
        if self.settings.starts_window(self._finished_steps):
            self._freeze_strongest()
        elif self._finished_steps == self.settings.last_step:
            self._frozen = []
            _logger.info("step %d: every vector trains again", self._finished_steps)

    def _update_strengths(self) -> None:
        strengths = [training_strength(vector, self._initial[name]) for name, vector in self._vectors.items()]
        self._strengths = self._strengths.to(strengths[0].device)
        latest = torch.stack([strength.to(self._strengths) for strength in strengths])
        self._strengths = smoothed_strength(self._strengths, latest, self.settings.smoothing)

    def _freeze_strongest(self) -> None:
        strengths = dict(zip(self._vectors, self._strengths.tolist(), strict=True))
        names = list(self._vectors)
        chosen = [names[index] for index in strongest_vectors(self._strengths, self._top_k).tolist()]
        self._frozen = sorted(chosen, key=lambda name: -strengths[name])
        window = FreezingWindow(
            step=self._finished_steps,
            until=self._finished_steps + self.settings.interval,
            frozen={name: strengths[name] for name in self._frozen},
        )
        self.log.append(window)
        strongest = self._frozen[0]
        _logger.info(
            "step %d: %d of %d vectors frozen until step %d, the strongest %s (%.3g)",
            window.step,
            len(self._frozen),
            len(self._vectors),
            window.until,
            strongest,
            strengths[strongest],
        )
