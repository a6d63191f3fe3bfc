"""The spectral layers of a model without a walk over all its modules: live weight changes ask for them each time."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.adapters.layers import SpectralLayer


class _Known(NamedTuple):
    configs: tuple[object, ...]  # PEFT's, one for each adapter that was in the model when the layers were found
    layers: list[tuple[str, weakref.ref[SpectralLayer]]]


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def indexed_layers(model: nn.Module) -> dict[str, SpectralLayer]:
    """What `spectral_layers` finds in ``model``, remembered for as long as its adapters are the same.

    Whoever adds or removes layers, PEFT and diffusers too, adds or removes an entry of ``model.peft_config``, and no
    two entries are one object. Nothing is kept alive.
    """
    peft_config = getattr(model, "peft_config", None)
    configs = tuple(peft_config.values()) if isinstance(peft_config, Mapping) else ()
    known = _known.get(model)
    if known is not None and len(known.configs) == len(configs):
        layers = {path: layer for path, reference in known.layers if (layer := reference()) is not None}
        if len(layers) == len(known.layers) and all(map(operator.is_, known.configs, configs)):
            return layers
    layers = spectral_layers(model)
    _known[model] = _Known(configs, [(path, weakref.ref(layer)) for path, layer in layers.items()])
    return layers
