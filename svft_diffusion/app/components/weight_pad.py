"""The weights of two adapters, or of four, by one point that is dragged or moved with the arrow keys.

The page's script does it all: the point changes the cards' weights in the browser, and asks the server nothing.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from svft_diffusion.app.assets import asset

# What a script returns is a list with one item for each output.
_CARDS_TO_PAD = "(cards) => [cards]"
# Cards may have come or gone meanwhile: of the pad's list, only the weights count.
_WEIGHTS_TO_CARDS = """(pad, cards) => {
  const weights = new Map(pad.map((card) => [card.id, card.weight]));
  return [cards.map((card) => (weights.has(card.id) ? { ...card, weight: weights.get(card.id) } : card))];
}"""


def weight_pad(cards: gr.HTML) -> gr.HTML:
    """Place the component; it shows the adapters of ``cards`` and sets their weights there.

    Args:
        cards: see `components.adapter_cards`.
    """
    pad = gr.HTML(
        cards.value,
        html_template='<div class="weight-pad"></div>',
        css_template=asset("weight_pad.css"),
        js_on_load=asset("weight_pad_point.js") + asset("weight_pad.js"),
        apply_default_css=False,
        elem_id="weight-pad",
    )
    here: dict[str, Any] = {"fn": None, "queue": False, "show_progress": "hidden", "api_visibility": "private"}
    cards.change(inputs=cards, outputs=pad, js=_CARDS_TO_PAD, **here)
    pad.weigh(inputs=[pad, cards], outputs=cards, js=_WEIGHTS_TO_CARDS, **here)
    return pad
