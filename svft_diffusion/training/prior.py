"""Prior preservation without class pictures: what the base model itself predicts is what the class should stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.models import ModelFamily
from svft_diffusion.models.family import PICTURE_SIZES
from svft_diffusion.training.batches import Batch
from svft_diffusion.training.prompts import PromptTable


@contextmanager
def adapters_off(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """While entered, the models are the base; what trains stays as it is, frozen vectors too."""
    layers = [layer for model in models.values() for layer in spectral_layers(model).values()]
    before = [layer.disable_adapters for layer in layers]
    # Not PEFT's enable_adapters(), which also sets what trains.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def base_prediction(
    family: ModelFamily, models: Mapping[str, nn.Module], prompts: PromptTable, batch: Batch
) -> Callable[[Tensor, Tensor], Tensor]:
    """What the base model predicts for the second half of a batch, from its noisy latents and timesteps.

    Text encoders that train are those of the base for that time, too.
    """
    half = len(batch.prompts) // 2

    def predict(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        with torch.no_grad(), adapters_off(models):
            conditioning = prompts.conditioning(batch.prompts[half:], anew=True) | {PICTURE_SIZES: batch.sizes[half:]}
            return family.predict(noisy_latents, timesteps, conditioning)

    return predict
