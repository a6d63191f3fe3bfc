"""Models that no step reads wait in the CPU's memory, and are on the accelerator for samples alone.

Text encoders whose prompts are all encoded, the VAE when all latents are, a safety checker. Moving a model changes none
of its bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Elsewhere there is one memory for everything.
_MEMORY_OF_THEIR_OWN = ("cuda", "xpu")


class RestingModels:
    """Frozen models that are on the CPU from the first `rest` on, but for the time of `awake`.

    Args:
        models: that rest; those that can't be moved stay where they are.
        device: where they compute.
    """

    def __init__(self, models: Iterable[nn.Module], device: torch.device) -> None:
        apart = device.type in _MEMORY_OF_THEIR_OWN
        self._models = [model for model in models if apart and _can_move(model)]
        self._device = device
        self._rests = False

    def rest(self) -> None:
        """From here on no step reads the models."""
        self._rests = True
        self._move("cpu")

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While entered, the models are where they compute."""
        if not self._rests:
            yield
            return
        self._move(self._device)
        try:
            yield
        finally:
            self._move("cpu")

    def _move(self, device: torch.device | str) -> None:
        for model in self._models:
            model.to(device)


def resting_models(
    components: Mapping[str, Any], busy: Iterable[str], *, latents_cached: bool, device: torch.device
) -> RestingModels:
    """All models of a pipeline that no step reads.

    Args:
        components: the pipeline's.
        busy: those that steps read besides the VAE: the denoiser, and text encoders that are not done.
        latents_cached: steps read no picture.
    """
    read = {*busy} if latents_cached else {*busy, "vae"}
    models = (model for name, model in components.items() if isinstance(model, nn.Module) and name not in read)
    return RestingModels(models, device)


def _can_move(model: nn.Module) -> bool:
    """Not so with a model that was quantized when it was loaded, or that accelerate places."""
    return getattr(model, "hf_quantizer", None) is None and getattr(model, "hf_device_map", None) is None
