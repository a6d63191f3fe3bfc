"""Adapters that a prompt names, ``<adapter:name:0.8>``, beside those on the cards."""

from __future__ import annotations

from collections.abc import Mapping

from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.app.components.adapter_cards import Card, with_card
from svft_diffusion.app.shelf.library import Library, LibraryEntry
from svft_diffusion.errors import UserError
from svft_diffusion.settings import nearest_hint


def with_tags(cards: object, tags: Mapping[str, AdapterWeight], library: Library) -> object:
    """The cards with those that tags of a prompt stand for, in place of the ones of the same adapters.

    Raises:
        UserError: a tag that names no adapter of the library, with the nearest one; or two name the same.
    """
    if not tags:
        return cards
    tagged: dict[str, Card] = {}
    for name, weight in tags.items():
        entry = _named(name, library)
        if entry.id in tagged:
            raise UserError(f"the prompt names the adapter {entry.name} twice")
        tagged[entry.id] = with_card([], entry, weight)[0]
    kept = [tagged.pop(str(card.get("id")), card) for card in cards] if isinstance(cards, list) else []
    return [*kept, *tagged.values()]


def _named(name: str, library: Library) -> LibraryEntry:
    try:
        return library.by_name(name)
    except UserError:
        hint = nearest_hint(name[:80], [entry.name for entry in library.entries()])
        raise UserError(f"the prompt names an adapter {name[:80]!r} that is not in the library{hint}") from None
