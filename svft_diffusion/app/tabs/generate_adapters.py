"""The adapters of a visitor: from the library or his own machine onto the cards, and how they meet there."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from svft_diffusion.algebra.interference import interference
from svft_diffusion.algebra.interference_report import meetings_in_words
from svft_diffusion.app.components.adapter_cards import Card, chosen_adapters, with_card
from svft_diffusion.app.components.card_changes import changed_cards
from svft_diffusion.app.components.interference_line import interference_line
from svft_diffusion.app.context import QUEUE, AppContext, Shared, shows_user_errors
from svft_diffusion.app.drawing.open_base import name_in_pipeline
from svft_diffusion.app.shelf.library import LibraryEntry
from svft_diffusion.errors import UserError


@dataclass(frozen=True)
class AdapterPicker:
    """What brings adapters onto the cards."""

    choice: gr.Dropdown
    upload: gr.UploadButton
    meetings: gr.HTML


def adapter_picker(shared: Shared) -> AdapterPicker:
    """Place the cards and what belongs to them."""
    shared.cards.render()
    meetings = interference_line()
    with gr.Row():
        choice = gr.Dropdown(
            [], value=None, label="Add an adapter of the library", elem_id="add-adapter", scale=4, min_width=180
        )
        upload = gr.UploadButton(
            "Upload",
            size="md",
            file_types=[".safetensors", ".png"],
            file_count="multiple",
            elem_id="upload-adapter",
            elem_classes="beside-field",
            scale=1,
            min_width=80,
        )
    return AdapterPicker(choice, upload, meetings)


def wire_adapter_picker(picker: AdapterPicker, context: AppContext, shared: Shared, completion: gr.HTML) -> None:
    """Add what is chosen or uploaded.

    Args:
        completion: takes the names that a prompt can use.
    """
    page = AdapterEvents(context)
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    lists = [picker.choice, completion]
    picker.choice.input(
        page.add,
        [picker.choice, shared.cards, shared.base],
        [picker.choice, shared.changes],
        trigger_mode="multiple",
        **quiet,
    )
    picker.upload.upload(
        page.add_uploads, [picker.upload, shared.cards, shared.base], [shared.changes, *lists], api_visibility="private"
    )
    picker.meetings.submit(
        page.compare,
        [shared.cards, shared.base],
        picker.meetings,
        concurrency_id=QUEUE,
        concurrency_limit=1,
        trigger_mode="always_last",
        **quiet,
    )
    gr.on([picker.choice.focus, shared.tab.select], page.refresh, None, lists, **quiet)
    # A page that opens later sees what came in the meantime.
    root = gr.context.Context.root_block
    assert root is not None
    root.load(page.refresh, None, lists, **quiet)


class AdapterEvents:
    """What happens when adapters come onto the cards, and are compared."""

    def __init__(self, context: AppContext) -> None:
        self._library = context.library
        self._studio = context.studio

    def refresh(self) -> list[Any]:
        """What the library holds now: for the list, and for the prompt."""
        entries = self._library.entries()
        names = [
            {"name": entry.name, "title": entry.header.title or "", "weight": f"{entry.header.suggested_strength:g}"}
            for entry in entries
        ]
        return [gr.update(choices=[(entry.label, entry.id) for entry in entries]), names]

    @shows_user_errors
    def add(self, id: str | None, cards: list[Card], base: str) -> tuple[Any, Any]:
        """Put the chosen adapter onto a card."""
        if not id:
            return gr.skip(), gr.skip()
        card = self._with(cards, self._library.get(id), base)[-1]
        return gr.update(value=None), changed_cards(added=[card])

    @shows_user_errors
    def add_uploads(self, files: list[str] | None, cards: list[Card], base: str) -> list[Any]:
        """Take files into the library and put them onto cards. What can't be keeps nothing else from it."""
        problems: list[str] = []
        before = cards = cards or []
        for file in map(Path, files or []):
            try:
                entries = self._library.add_all(file, file.name)
            except UserError as problem:
                problems.append(str(problem))
                continue
            for entry in entries:
                try:
                    cards = self._with(cards, entry, base)
                except UserError as problem:
                    problems.append(str(problem))
        if problems and cards == before:
            raise UserError("; ".join(problems))
        if problems:
            gr.Warning(html.escape("; ".join(problems), quote=False))
        return [changed_cards(added=cards[len(before) :]), *self.refresh()]

    def compare(self, cards: list[Card], base: str) -> list[str]:
        """How the adapters that are on meet, in words."""
        try:
            chosen = chosen_adapters(cards, self._library, base, self._studio.on_mismatch)
            acting = [(adapter, weight) for adapter, weight in chosen if weight != 0]
            if len(acting) < 2:
                return []
            names = {name_in_pipeline(adapter.sha256): adapter.name for adapter, _ in acting}
            with self._studio.with_adapters(base, acting) as pipeline:
                weights = {name_in_pipeline(adapter.sha256): weight for adapter, weight in acting}
                return meetings_in_words(interference(pipeline, weights), names)
        except UserError as problem:
            return [str(problem)]

    def _with(self, cards: list[Card], entry: LibraryEntry, base: str) -> list[Card]:
        if self._studio.on_mismatch == "error" and (reason := self._library.fits(entry, base)) is not None:
            raise UserError(reason)
        return with_card(cards or [], entry)
