"""Weights of adapters as a person types them: ``0.8``, or ``unet=0.5,te=0.2``."""

from __future__ import annotations

import math

from svft_diffusion.errors import UserError
from svft_diffusion.files.names import COMPONENTS

COMPONENT_LABELS = {
    "unet": "unet",
    "transformer": "transformer",
    "te": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
}
"""How the command line calls the components of a pipeline; their own names are understood too."""


def component_weights(text: str, weight: str) -> dict[str, float] | None:
    """``unet=0.5,te=0.2`` as component -> weight; None for what has no names in it."""
    if "=" not in weight:
        return None
    weights: dict[str, float] = {}
    for part in weight.split(","):
        label, _, number = part.partition("=")
        component = COMPONENT_LABELS.get(label.strip(), label.strip())
        if component not in COMPONENTS:
            raise UserError(f"{text}: no component {label.strip()!r}; choose from {', '.join(COMPONENT_LABELS)}")
        if component in weights:
            raise UserError(f"{text}: {label.strip()} has two weights")
        weights[component] = weight_number(text, number, "FILE:unet=0.5,te=0.2")
    return weights


def weight_number(argument: str, weight: str, example: str) -> float:
    """A weight as a number; 1 for none."""
    number = 1.0 if not weight else number_in(weight)
    if number is None:
        raise UserError(f"{argument}: the weight {weight!r} is not a number; write {example}")
    if not math.isfinite(number):
        raise UserError(f"{argument}: the weight must be a finite number")
    return number


def number_in(text: str) -> float | None:
    """The number that a text is, if it is one."""
    try:
        return float(text)
    except ValueError:
        return None
