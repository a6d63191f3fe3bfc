"""The cards of the loaded adapters: a fixed number of slots, of which those in use are shown.

Slots that exist from the start keep their sliders' values on the page, so that moving a slider asks the server
nothing, and one request carries all weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from svft_diffusion.errors import UserError
from svft_diffusion.sampling.adapter_choice import CheckedAdapter

MOST_ADAPTERS = 8
LOWEST_WEIGHT, HIGHEST_WEIGHT = -1.0, 2.0

Slots = tuple[CheckedAdapter | None, ...]
EMPTY_SLOTS: Slots = (None,) * MOST_ADAPTERS


@dataclass(frozen=True)
class Card:
    """The components of one slot."""

    row: gr.Row
    weight: gr.Slider
    remove: gr.Button


def build_card(adapter: CheckedAdapter | None) -> Card:
    """Place one slot on the page, filled or hidden."""
    with gr.Row(visible=adapter is not None, elem_classes="adapter-card") as row:
        weight = gr.Slider(
            LOWEST_WEIGHT,
            HIGHEST_WEIGHT,
            value=1.0 if adapter is None else adapter.weight,
            step=0.05,
            label="" if adapter is None else describe(adapter),
            scale=1,
            min_width=180,
        )
        remove = gr.Button("Remove", size="sm", scale=0, min_width=80)
    return Card(row, weight, remove)


def describe(adapter: CheckedAdapter) -> str:
    """The title of a card."""
    method = (
        adapter.header.method
        if adapter.header.pattern == "plain"
        else f"{adapter.header.pattern} {adapter.header.method}"
    )
    trigger = f", trigger: {adapter.header.trigger}" if adapter.header.trigger else ""
    return f"{adapter.name} ({method}{trigger})"


def with_adapter(slots: Slots, adapter: CheckedAdapter) -> Slots:
    """The slots with one more adapter, in the first free one.

    Raises:
        UserError: it is there already, all slots are taken, or its weight is beyond the slider.
    """
    if any(other is not None and other.sha256 == adapter.sha256 for other in slots):
        raise UserError(f"{adapter.name} is loaded already; move its slider instead")
    if None not in slots:
        raise UserError(f"all {MOST_ADAPTERS} places are taken; remove an adapter first")
    if not LOWEST_WEIGHT <= adapter.weight <= HIGHEST_WEIGHT:
        raise UserError(
            f"the weight of {adapter.name} must be between {LOWEST_WEIGHT:g} and {HIGHEST_WEIGHT:g}, "
            f"got {adapter.weight:g}"
        )
    return replaced(slots, slots.index(None), adapter)


def replaced(slots: Slots, number: int, adapter: CheckedAdapter | None) -> Slots:
    """The slots with another content in one of them."""
    return (*slots[:number], adapter, *slots[number + 1 :])


def weighted(slots: Slots, weights: Sequence[float]) -> tuple[tuple[CheckedAdapter, float], ...]:
    """The adapters in the slots with the values of their sliders."""
    return tuple(
        (adapter, float(weight)) for adapter, weight in zip(slots, weights, strict=True) if adapter is not None
    )


def card_updates(before: Slots, after: Slots) -> list[Any]:
    """Updates of all cards' rows and sliders; a slot whose content stays keeps the slider where it is."""
    updates: list[Any] = []
    for old, new in zip(before, after, strict=True):
        if old == new:
            updates += [gr.skip(), gr.skip()]
        elif new is None:
            updates += [gr.update(visible=False), gr.skip()]
        else:
            updates += [gr.update(visible=True), gr.update(label=describe(new), value=new.weight)]
    return updates
