"""Presets that name the layers of a model by what they do."""

from __future__ import annotations

import re

from torch import nn

from svft_diffusion.errors import UserError
from svft_diffusion.files.names import base_module

# Module names: UNets of diffusers (attn1 attends to the image, attn2 to the text) and CLIP text encoders.
_CROSS_ATTENTION = r"attn2\.(to_q|to_k|to_v|to_out\.0)"
_ATTENTION = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)|self_attn\.(q_proj|k_proj|v_proj|out_proj)"
_FEED_FORWARD = r"ff\.net\.(0\.proj|2)|mlp\.(fc1|fc2)"

PRESETS = {
    "attention": _ATTENTION,
    "cross-attention": _CROSS_ATTENTION,
    "feed-forward": _FEED_FORWARD,
    "attention+feed-forward": f"{_ATTENTION}|{_FEED_FORWARD}",
    "all-linear": r"[^.]+",
}
DEFAULT_PRESET = "attention+feed-forward"


def check_preset(preset: str) -> None:
    """Raise `UserError` with the choices if there is no such preset."""
    if preset not in PRESETS:
        raise UserError(f"unknown targets {preset!r}; choose from {', '.join(PRESETS)}")


def linear_layers(model: nn.Module) -> list[str]:
    """Paths of the linear layers of a model; one that adapters wrap counts once, under its own path."""
    layers: list[str] = []
    wrapper = None  # path of the outermost adapter layer that named_modules is inside of
    for path, module in model.named_modules():
        if wrapper is not None and path.startswith(f"{wrapper}."):
            continue
        wrapper = path if base_module(module) is not module else None
        if path and isinstance(base_module(module), nn.Linear):
            layers.append(path)
    return layers


def matching_layers(model: nn.Module, preset: str) -> list[str]:
    """Paths of the linear layers that ``preset`` names in ``model``.

    Raises:
        UserError: unknown preset, or one that matches nothing; the message lists what would match.
    """
    check_preset(preset)
    linear = linear_layers(model)
    matched = _matching(linear, preset)
    if not matched:
        possible = [name for name in PRESETS if _matching(linear, name)]
        remedy = f"choose from {', '.join(possible)}" if possible else "the model has no linear layer"
        raise UserError(f"targets {preset!r} match no layer of {type(model).__name__}; {remedy}")
    return matched


def _matching(paths: list[str], preset: str) -> list[str]:
    pattern = re.compile(rf"(?:.*\.)?(?:{PRESETS[preset]})")
    return [path for path in paths if pattern.fullmatch(path)]
