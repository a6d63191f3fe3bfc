"""What training holds in memory beyond the base model: counted, not read from the system, so that rows compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.training.run import Run


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """While entered, counts what the forward pass keeps for the backward pass, each piece of memory once.

    Weights and other tensors that stay in memory anyway are not counted.
    """

    def __init__(self, run: Run) -> None:
        models = [part for part in run.family.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        self._staying = {_storage(tensor) for model in models for tensor in (*model.parameters(), *model.buffers())} | {
            _storage(tensor) for tensor in _factors(run)
        }
        self._sizes: dict[int, int] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self._sizes.values())

    def _keep(self, tensor: Tensor) -> Tensor:
        place = _storage(tensor)
        if place not in self._staying:
            self._sizes[place] = max(self._sizes.get(place, 0), tensor.untyped_storage().nbytes())
        return tensor


def bytes_of_training(run: Run, saved: SavedBytes) -> int:
    """Trained values with gradients and the optimizer's state, what our adapters add to the model, and ``saved``."""
    optimizer: Any = getattr(run.optimizer, "optimizer", run.optimizer)
    state = [value for of_one in optimizer.state.values() for value in of_one.values() if isinstance(value, Tensor)]
    values = list(run.trained.values())
    return saved.total + sum(tensor.nbytes for tensor in (*values, *values, *state, *_factors(run)))


def _factors(run: Run) -> list[Tensor]:
    """The singular vectors and values of our adapters' layers."""
    layers = [layer for model in run.models.values() for layer in spectral_layers(model).values()]
    return [tensor for layer in layers if layer.factors is not None for tensor in layer.factors]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
