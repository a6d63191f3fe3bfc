"""One spelling for the adapted layers of a pipeline, whatever the versions of the libraries.

A canonical name is ``<component>.<module path>``, for example ``unet.mid_block.attentions.0...attn1.to_q`` or
``text_encoder.text_model.encoder.layers.0.self_attn.q_proj``. The module path is that of the model at hand, with one
exception: transformers 5 dropped the level ``text_model`` from ``CLIPTextModel``, and names keep it, so that a file
serves transformers 4 and 5. ``CLIPTextModelWithProjection`` has that level in both, ``T5EncoderModel`` in neither
(``encoder.block.0.layer.0.SelfAttention.q``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from svft_diffusion.errors import UserError

# Components of a pipeline that can carry an adapter, in the order in which they are visited.
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
COMPONENTS = ("unet", "transformer", *TEXT_ENCODERS)

_TEXT_MODEL = "text_model."
# `down_blocks.0`, `mid_block`, `transformer_blocks.7`, `encoder.layers.3`: as far as a block has a number of its own.
_BLOCK = re.compile(r"(?:text_model\.)?(encoder\.(?:layers|block)\.\d+|\w+\.\d+|\w+)")


def components_of(pipe: object) -> dict[str, nn.Module]:
    """The components that can carry an adapter: from a pipeline, or from a mapping of component names to models."""
    found = {}
    for name in COMPONENTS:
        model = pipe.get(name) if isinstance(pipe, Mapping) else getattr(pipe, name, None)
        if isinstance(model, nn.Module):
            found[name] = getattr(model, "_orig_mod", model)  # what `pipe.unet = torch.compile(pipe.unet)` wraps
    return found


def canonical_name(component: str, model: nn.Module, path: str) -> str:
    """Canonical name of the module at ``path`` in ``model``, which is the pipeline's ``component``."""
    return f"{component}.{_dropped_level(model)}{path}"


def split_canonical_name(name: str) -> tuple[str, str]:
    """``unet.a.b`` -> (``unet``, ``a.b``).

    Raises:
        UserError: the name does not begin with a component that can carry an adapter.
    """
    component, _, path = name.partition(".")
    if component not in COMPONENTS or not path:
        raise UserError(f"tensor {name!r} belongs to none of the components {', '.join(COMPONENTS)}")
    return component, path


def module_path(model: nn.Module, canonical_path: str) -> str:
    """Path in ``model`` of the module that a canonical name calls ``canonical_path`` (the name less its component)."""
    return canonical_path.removeprefix(_dropped_level(model))


def base_module(module: nn.Module) -> nn.Module:
    """The module below all adapter layers that wrap it."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def block_of(layer: str) -> str:
    """The block of a layer by canonical name: ``unet.down_blocks.0.attentions.1...to_q`` -> ``unet.down_blocks.0``."""
    component, _, path = layer.partition(".")
    found = _BLOCK.match(path)
    return f"{component}.{found[1] if found else path}"


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts ``blocks.10`` after ``blocks.9``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _dropped_level(model: nn.Module) -> str:
    is_clip_text = getattr(getattr(model, "config", None), "model_type", None) == "clip_text_model"
    return _TEXT_MODEL if is_clip_text and not hasattr(model, "text_model") else ""
