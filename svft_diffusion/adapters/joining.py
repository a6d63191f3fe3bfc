"""An adapter that is being added to models joins those that act there, or leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from svft_diffusion.adapters.injection import remove, spectral_layers
from svft_diffusion.adapters.layers import SpectralLayer


class _Activity(NamedTuple):
    """What adding an adapter changes about a layer's other adapters."""

    layer: SpectralLayer
    active: list[str]
    disabled: bool


@contextmanager
def joining(models: Mapping[str, nn.Module], name: str) -> Iterator[None]:
    """Adapter ``name``, which is added within the context, is active afterwards beside those active before, frozen.

    If anything goes wrong within, an interruption too, it is removed and all is as it was.
    """
    before = {
        component: [
            _Activity(layer, list(layer.active_adapters), layer.disable_adapters)
            for layer in spectral_layers(model).values()
        ]
        for component, model in models.items()
    }
    # PEFT freezes the base, in which PyTorch rounds 16-bit products on the CPU otherwise than in one that trains.
    trains = [(parameter, parameter.requires_grad) for model in models.values() for parameter in model.parameters()]
    try:
        yield
        for component, model in models.items():
            active = list(dict.fromkeys(other for activity in before[component] for other in activity.active))
            for layer in spectral_layers(model).values():
                layer.enable_adapters(True)
                layer.set_adapter([*active, name], inference_mode=True)
    except BaseException:
        for model in models.values():
            remove(model, name)
        for activities in before.values():
            for layer, others, disabled in activities:
                layer.enable_adapters(not disabled)
                layer.set_adapter(others, inference_mode=True)
        raise
    finally:
        for parameter, trained in trains:
            parameter.requires_grad_(trained)
