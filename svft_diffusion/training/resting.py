"""Models that no step reads wait in the CPU's memory, and are on the accelerator for samples alone.

Text encoders whose prompts are all encoded, the VAE when all latents are, a safety checker; and in the models that
train, frozen weights in whose place steps read singular factors. Moving a model changes none of its bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.adapters.layers import SpectralLayer

# Elsewhere there is one memory for everything.
_MEMORY_OF_THEIR_OWN = ("cuda", "xpu")
_PARKS_WEIGHTS = (*_MEMORY_OF_THEIR_OWN, "cpu")


class RestingModels:
    """Frozen models that are on the CPU from the first `rest` on, but for the time of `awake`.

    Args:
        models: that rest; those that can't be moved stay where they are.
        device: where they compute.
        layers: of the models that train; those may park their weights meanwhile.
    """

    def __init__(self, models: Iterable[nn.Module], device: torch.device, layers: Iterable[SpectralLayer] = ()) -> None:
        apart = device.type in _MEMORY_OF_THEIR_OWN
        self._models = [model for model in models if apart and _can_move(model)]
        self._layers = list(layers) if device.type in _PARKS_WEIGHTS else []
        self._device = device
        self._rests = False

    def rest(self) -> None:
        """From here on no step reads the models."""
        self._rests = True
        self._move("cpu")
        self._park()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While entered, the models are where they compute."""
        if not self._rests:
            yield
            return
        for layer in self._layers:
            layer.wake()
        self._move(self._device)
        try:
            yield
        finally:
            self._move("cpu")
            self._park()

    def _park(self) -> None:
        for layer in self._layers:
            layer.allow_parking()

    def _move(self, device: torch.device | str) -> None:
        for model in self._models:
            model.to(device)


def resting_models(
    components: Mapping[str, Any],
    busy: Iterable[str],
    *,
    latents_cached: bool,
    device: torch.device,
    layers: Iterable[SpectralLayer] = (),
) -> RestingModels:
    """All models of a pipeline that no step reads.

    Args:
        components: the pipeline's.
        busy: those that steps read besides the VAE: the denoiser, and text encoders that are not done.
        latents_cached: steps read no picture.
        layers: that may park their weights, see `parkable_layers`.
    """
    read = {*busy} if latents_cached else {*busy, "vae"}
    models = (model for name, model in components.items() if isinstance(model, nn.Module) and name not in read)
    return RestingModels(models, device, layers)


def parkable_layers(models: Mapping[str, nn.Module]) -> list[SpectralLayer]:
    """The layers whose weights nobody reads but they themselves.

    Not so where modules share one, or where a hook of accelerate places it. A model's first parameter tells others
    where the model is.
    """
    found = []
    for model in models.values():
        holders = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
        holders.update(list(holders)[:1])
        for layer in spectral_layers(model).values():
            base = layer.get_base_layer()
            alone = isinstance(base.weight, nn.Parameter) and holders[base.weight] == 1
            if alone and not (layer.keeps_base_apart or hasattr(base, "_hf_hook")):
                found.append(layer)
    return found


def _can_move(model: nn.Module) -> bool:
    """Not so with a model that was quantized when it was loaded, or that accelerate places."""
    return getattr(model, "hf_quantizer", None) is None and getattr(model, "hf_device_map", None) is None
