"""Changes of the adapter cards that the server asks for.

A request takes its time, in which the visitor may move a slider or add another adapter. So the server does not send
back the list that came along with the request; it says what is to change, and the page changes the list that it has.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from svft_diffusion.app.assets import asset
from svft_diffusion.app.components.adapter_cards import Card

# What a script returns is a list with one item for each output.
_APPLY = """(changes, cards) => {
  const removed = new Set(changes.removed);
  const weights = new Map(Object.entries(changes.weights));
  const kept = cards
    .filter((card) => !removed.has(card.id))
    .map((card) => (weights.has(card.id) ? { ...card, weight: weights.get(card.id) } : card));
  const there = new Set(kept.map((card) => card.id));
  return [[...kept, ...changes.added.filter((card) => !there.has(card.id))]];
}"""


def changed_cards(
    *, added: Sequence[Card] = (), removed: Sequence[str] = (), weights: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """A value of the component.

    Args:
        added: put behind the others, but for adapters that have a card.
        removed: ids.
        weights: by id.
    """
    number = uuid.uuid4().hex  # the same change twice is two changes
    return {"added": list(added), "removed": list(removed), "weights": dict(weights or {}), "number": number}


def card_changes() -> gr.HTML:
    """Place the component, which shows nothing."""
    return gr.HTML(None, html_template="<div></div>", js_on_load=asset("card_changes.js"), elem_id="card-changes")


def wire_card_changes(changes: gr.HTML, cards: gr.HTML) -> None:
    """Let the changes come to the cards."""
    changes.apply(
        None, [changes, cards], cards, js=_APPLY, queue=False, show_progress="hidden", api_visibility="private"
    )
