"""The cards of a visitor's adapters: one for each, with its weight.

The page's script draws them from a list of dictionaries, the value of the component, and writes into it what the
visitor does. Moving a slider asks the server nothing; the whole list comes along with the next request. It comes from
the visitor, so nothing in it is trusted: of each card the server reads ``id``, ``weight``, ``on``, ``components`` and
``blocks``, and checks them. The other entries are for show.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import gradio as gr

from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.app.assets import asset
from svft_diffusion.app.shelf.library import Library, LibraryEntry
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import COMPONENTS
from svft_diffusion.sampling.adapter_choice import CheckedAdapter
from svft_diffusion.sampling.block_presets import (
    ALL_BLOCKS,
    BLOCK_PRESETS,
    block_weights,
    preset_of,
    usable_presets,
)

__all__ = [
    "BLOCK_PRESETS",
    "HIGHEST_WEIGHT",
    "LOWEST_WEIGHT",
    "Card",
    "adapter_cards",
    "chosen_adapters",
    "multiplied",
    "with_card",
    "with_warnings",
]

LOWEST_WEIGHT, HIGHEST_WEIGHT = -10.0, 10.0
_SLIDER = -1.0, 2.0  # or what the file says, where that is wider
_COMPONENT_TITLES = {
    "unet": "UNet",
    "transformer": "Transformer",
    "text_encoder": "Text encoder",
    "text_encoder_2": "Text encoder 2",
    "text_encoder_3": "Text encoder 3",
}
_DIGITS_SHOWN = 4  # as the page's script shows them
_DIGITS = 10  # after the point: 0.8 x 0.7 is 0.56, and not 0.5599999999999999

Card = dict[str, Any]
"""What the server reads: ``id`` in the library, ``weight``, ``on``, ``components`` (component -> share of the weight;
None: 1 for each) and ``blocks`` (one of `BLOCK_PRESETS`). Shown: ``name``, ``title``, ``trigger``, ``thumbnail`` (data
URI), ``lowest`` and ``highest`` of the slider, ``parts`` and ``presets`` to choose from, and ``warning``."""


def adapter_cards(value: list[Card], *, render: bool = True) -> gr.HTML:
    """The component, with its script and style."""
    return gr.HTML(
        value,
        html_template='<div class="adapter-cards"></div>',
        css_template=asset("adapter_cards.css"),
        js_on_load=asset("adapter_cards.js"),
        apply_default_css=False,
        elem_id="adapter-cards",
        render=render,
    )


def with_card(value: object, entry: LibraryEntry, weight: AdapterWeight | None = None) -> list[Card]:
    """The cards with one more.

    Args:
        value: what the component holds.
        weight: at the start; the one that the file suggests if None. One for each component, or with blocks of a
            preset, as a picture's settings have it, is shown as such.

    Raises:
        UserError: there is a card of this adapter, or the weight can't be shown.
    """
    cards = _cards(value)
    if any(card.get("id") == entry.id for card in cards):
        raise UserError(f"{entry.name} is there already; move its slider instead")
    header = entry.header
    if weight is None:
        weight = min(max(header.suggested_strength, LOWEST_WEIGHT), HIGHEST_WEIGHT)
    lowest, highest = header.strength_range
    parts = _parts(entry)
    card: Card = {
        "id": entry.id,
        "on": True,
        **_shown_weight(weight, entry),
        "name": entry.name,
        "title": header.title or entry.name,
        "trigger": header.trigger or "",
        "thumbnail": _data_uri(header.thumbnail),
        "lowest": max(LOWEST_WEIGHT, min(_SLIDER[0], lowest)),
        "highest": min(HIGHEST_WEIGHT, max(_SLIDER[1], highest)),
        "parts": [[name, _COMPONENT_TITLES[name]] for name in parts] if len(parts) > 1 else [],
        "presets": [[name, BLOCK_PRESETS[name]] for name in usable_presets(entry.layers)],
        "warning": "",
    }
    _weight_of(card, entry)
    return [*cards, card]


def with_warnings(value: object, library: Library, base: str, on_mismatch: OnMismatch) -> list[Card]:
    """The cards, each saying why it can't act on this base, if it can't: for another base, and when files go."""
    cards = []
    for card in _cards(value):
        try:
            _fitting(card, library, base, on_mismatch)
        except UserError as problem:
            cards.append({**card, "warning": str(problem)})
        else:
            cards.append({**card, "warning": ""})
    return cards


def chosen_adapters(
    value: object, library: Library, base: str, on_mismatch: OnMismatch
) -> tuple[tuple[CheckedAdapter, AdapterWeight], ...]:
    """The adapters of the cards that are on, with their weights.

    Raises:
        UserError: an adapter is gone from the library or unfit for the base, or a weight is none or beyond -10 to 10.
    """
    chosen = []
    for card in _cards(value):
        if card.get("on") is not True:
            continue
        entry = _fitting(card, library, base, on_mismatch)
        weight = _weight_of(card, entry)
        checked = CheckedAdapter(entry.name, entry.file, float(card["weight"]), entry.sha256, entry.header)
        chosen.append((checked, weight))
    return tuple(chosen)


def multiplied(value: object, factors: Mapping[str, float]) -> list[Card]:
    """The cards, the weights of some times factors.

    Args:
        factors: by the id of the adapter.

    Raises:
        UserError: a weight would be beyond -10 to 10.
    """
    cards = []
    for card in _cards(value):
        factor = factors.get(str(card.get("id")))
        if factor is not None:
            weight = round(float(card["weight"]) * factor, _DIGITS_SHOWN)
            if not LOWEST_WEIGHT <= weight <= HIGHEST_WEIGHT:
                raise UserError(
                    f"the weight of {card.get('name')} would be {weight:g}, beyond {LOWEST_WEIGHT:g} to "
                    f"{HIGHEST_WEIGHT:g}; lower all weights first"
                )
            card = {**card, "weight": weight}
        cards.append(card)
    return cards


def _cards(value: object) -> list[Card]:
    if value is None or value == "":
        return []
    if not isinstance(value, list) or not all(isinstance(card, dict) for card in value):
        raise UserError("the adapter cards are damaged; reload the page")
    return value


def _fitting(card: Card, library: Library, base: str, on_mismatch: OnMismatch) -> LibraryEntry:
    try:
        entry = library.get(str(card.get("id")))
    except UserError:
        name = f"{card.get('name') or 'an adapter'}"[:80]
        raise UserError(f"{name} is no longer in the library; remove its card") from None
    if on_mismatch == "error" and (reason := library.fits(entry, base)) is not None:
        raise UserError(reason)
    return entry


def _parts(entry: LibraryEntry) -> list[str]:
    """The components that the adapter changes."""
    return [name for name in COMPONENTS if name in entry.header.components]


def _weight_of(card: Card, entry: LibraryEntry) -> AdapterWeight:
    """The weight that a card stands for: one number, where that says it all."""
    weight = _number(card.get("weight"), entry)
    shares, preset = card.get("components"), card.get("blocks", ALL_BLOCKS)
    if shares is None:
        shares = {}
    if not isinstance(shares, Mapping) or not set(shares) <= set(_parts(entry)) or not isinstance(preset, str):
        raise UserError(f"the card of {entry.name} is damaged; remove it and add the adapter again")
    if not shares and preset == ALL_BLOCKS:
        return weight
    weights = {
        part: _number(round(weight * _number(shares.get(part, 1.0), entry), _DIGITS), entry) for part in _parts(entry)
    }
    try:
        return block_weights(weights, preset, entry.layers)
    except UserError as problem:
        raise UserError(f"{entry.name}: {problem}") from problem


def _shown_weight(weight: AdapterWeight, entry: LibraryEntry) -> Card:
    """``weight``, ``components`` and ``blocks`` of the card that stands for a weight."""
    if not isinstance(weight, Mapping):
        return {"weight": weight, "components": None, "blocks": ALL_BLOCKS}
    if unknown := set(weight) - set(_parts(entry)):
        raise UserError(f"{entry.name} has nothing in the {min(unknown)}")
    preset = ALL_BLOCKS
    shares: dict[str, float] = {}
    for part in _parts(entry):
        of_part = weight.get(part, 0.0)
        if isinstance(of_part, Mapping):
            found = preset_of(of_part, entry.layers)
            if found is None:
                raise UserError(f"{entry.name}: a card can't show weights of single blocks; the command line can")
            preset, of_part = found
        shares[part] = of_part
    return {"weight": 1.0, "components": shares, "blocks": preset}


def _number(value: object, entry: LibraryEntry) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"the weight of {entry.name} must be a number")
    if not LOWEST_WEIGHT <= value <= HIGHEST_WEIGHT:
        raise UserError(f"the weight of {entry.name} must be between {LOWEST_WEIGHT:g} and {HIGHEST_WEIGHT:g}")
    return float(value) + 0.0  # adding zero turns a negative zero into zero


def _data_uri(thumbnail: bytes | None) -> str:
    return "" if thumbnail is None else f"data:image/jpeg;base64,{base64.b64encode(thumbnail).decode('ascii')}"
