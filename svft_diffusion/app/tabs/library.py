"""The Library tab: the adapters that there are, what they are, and what can be done with them."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import gradio as gr

from svft_diffusion.app.assets import asset
from svft_diffusion.app.components.adapter_cards import with_card
from svft_diffusion.app.components.card_changes import changed_cards
from svft_diffusion.app.context import QUEUE, AppContext, Shared, shows_user_errors
from svft_diffusion.app.jobs.job_folder import JobFolder
from svft_diffusion.app.shelf.library import LibraryEntry
from svft_diffusion.app.shelf.library_actions import AS_IT_IS, ForeignOptions, details, export, take_in, verify
from svft_diffusion.app.shelf.sample_thumbnail import sample_thumbnail
from svft_diffusion.errors import UserError
from svft_diffusion.exchange.conversion import PATTERNS
from svft_diffusion.models.loading import base_display_name
from svft_diffusion.terminal import printable

CARDS_AT_ONCE = 48
_DEFAULT_PATTERN = "default"
EXPORT_FORMATS = [
    ("LoRA, kohya", "kohya"),
    ("LoRA, diffusers", "diffusers"),
    ("LoRA, ComfyUI", "comfy-full"),
    ("adapter file, as it is", AS_IT_IS),
]
_SCROLL = "() => document.getElementById('library-details')?.scrollIntoView({block: 'nearest'})"
_LONGEST_TITLE = 80
_LONGEST_FACT = 120
_LONGEST_REASON = 300

ListValue = dict[str, Any]
Deleted = list[tuple[str, str]]  # token and name of what was deleted, the last one last


class LibraryHandlers:
    """The events of the tab. What belongs to one visitor comes in and goes out."""

    def __init__(self, context: AppContext) -> None:
        self._context = context
        self._library = context.library

    @shows_user_errors
    def listed(self, search: str | None, base: str, number: int, chosen: str | None) -> Iterator[ListValue]:
        """The list, at first without comparing adapters to the base where that may take seconds."""
        search = search or ""  # None: the page is not there yet
        listing = self._library.listing(search)
        entries = listing.entries[:number]
        value: ListValue = {
            "cards": [_card(entry, "is compared with the base model", "unknown") for entry in entries],
            "damaged": [
                {"name": printable(file.name, _LONGEST_FACT), "reason": printable(file.reason, _LONGEST_REASON)}
                for file in listing.damaged
            ],
            "note": _note(len(listing.entries), search),
            "more": min(CARDS_AT_ONCE, len(listing.entries) - len(entries)),
            "chosen": chosen,
        }
        if not all(self._library.is_compared(entry, base) for entry in entries):
            yield value
        cards = [_card(entry, *self._fit(entry, base)) for entry in entries]
        yield {
            **value,
            "cards": [card | {"addable": card["state"] == "fits" or not self._refuses_strangers} for card in cards],
        }

    @shows_user_errors
    def add_card(self, cards: list[dict[str, Any]], base: str, event: gr.EventData) -> Any:
        """Put an adapter on the cards of Generate, and say so; the list stays, for there may be more to add."""
        return self.added(cards, base, _id_of(event))

    @shows_user_errors
    def add_step(self, cards: list[dict[str, Any]], base: str, step: str | None) -> Any:
        """`add_card` for a step of a history."""
        if not step:
            raise UserError("choose a step of the training first")
        return self.added(cards, base, step)

    def added(self, cards: list[dict[str, Any]], base: str, id: str) -> Any:
        """One more card.

        Raises:
            UserError: it is gone, unfit for the base, or there already.
        """
        entry = self._library.get(id)
        reason = self._library.fits(entry, base)
        if reason is not None and self._refuses_strangers:
            raise UserError(reason)
        added = with_card(cards, entry)[-1]
        gr.Info(f"{html.escape(entry.name)} is on Generate now")
        return changed_cards(added=[added])

    @shows_user_errors
    def show_details(self, event: gr.EventData) -> tuple[Any, ...]:
        """Choose an adapter, and show all that its file says."""
        return self.shown(_id_of(event))

    def shown(self, id: str) -> tuple[Any, ...]:
        """Id, panel, text, and the steps of its training.

        Raises:
            UserError: it is gone or damaged.
        """
        entry = self._library.get(id)
        steps = [(f"step {one.step}", one.id) for one in self._library.history(id)]
        history = gr.Dropdown(choices=steps, value=steps[-1][1] if steps else None, visible=bool(steps))
        return (
            entry.id,
            gr.Column(visible=True),
            details(entry).splitlines(),
            history,
            gr.Button(visible=bool(steps)),
            gr.Textbox(visible=False),
            gr.DownloadButton(visible=False),
        )

    @shows_user_errors
    def verify(self, chosen: str | None, base: str) -> Any:
        """Verify the chosen adapter on the base model."""
        return _report(verify(self._context, self._chosen(chosen), base))

    @shows_user_errors
    def export(
        self, chosen: str | None, base: str, format: str, rank: str, strength: float | None, half: bool
    ) -> tuple[Any, Any]:
        """Export the chosen adapter, and offer the file."""
        entry = self._chosen(chosen)
        if strength is None:
            raise UserError("the strength must be a number other than 0")
        file, report = export(
            self._context, entry, base, format=format, rank=rank, strength=float(strength), half=bool(half)
        )
        return _report(report), gr.DownloadButton(value=str(file), visible=True)

    @shows_user_errors
    def delete(self, chosen: str | None, deleted: Deleted) -> tuple[Any, ...]:
        """Delete the chosen adapter."""
        entry = self._chosen(chosen)
        token = self._library.delete(entry.id)
        return (
            [*deleted, (token, entry.name)],
            None,
            gr.Column(visible=False),
            _report("; ".join([f"deleted {entry.name}", "Undo brings it back", *self._left_of_training(entry)])),
            gr.Button(interactive=True),
        )

    @shows_user_errors
    def undo(self, deleted: Deleted) -> tuple[Any, ...]:
        """Bring back what was deleted last."""
        if not deleted:
            raise UserError("there is nothing to undo any more")
        *others, (token, name) = deleted
        self._library.undo(token)
        return others, _report(f"{name} is back"), gr.Button(interactive=bool(others))

    @shows_user_errors
    def import_files(
        self, files: list[str] | None, base: str, pattern: str, off_diagonals: float | None, together: bool
    ) -> tuple[Any, Any]:
        """Take uploaded files into the library. If none can be taken in, the form stays as it is."""
        if not files:
            raise UserError("choose files to import first")
        options = ForeignOptions(
            None if pattern == _DEFAULT_PATTERN else pattern,
            int(off_diagonals or 0) or None,  # an empty field of Gradio says 0
            together,
        )
        entries, lines = take_in(self._context, [Path(file) for file in files], base, options)
        if not entries:
            raise UserError("; ".join(lines))
        return None, _report("\n".join(lines))

    @property
    def _refuses_strangers(self) -> bool:
        """Whether adapters of other bases can't be added."""
        return self._context.studio.on_mismatch == "error"

    def _left_of_training(self, entry: LibraryEntry) -> list[str]:
        """What a visitor should hear of the photos that the adapter was trained on, while they are there."""
        folder = self._context.config.training_dir.absolute()
        if not entry.file.is_relative_to(folder):
            return []
        job = JobFolder(folder / entry.file.relative_to(folder).parts[0])
        return ["the photos of its training stay until you delete that under Train"] if job.photos.exists() else []

    def _chosen(self, chosen: str | None) -> LibraryEntry:
        if not chosen:
            raise UserError("choose an adapter first: press Details on its card")
        return self._library.get(chosen)

    def _fit(self, entry: LibraryEntry, base: str) -> tuple[str, str]:
        reason = self._library.fits(entry, base)
        if reason is None:
            return f"compatible with {printable(base_display_name(base), _LONGEST_FACT)}", "fits"
        return f"incompatible: {printable(reason, _LONGEST_REASON)}", "unfit"


def build(context: AppContext, shared: Shared) -> None:
    """Place the tab's components, and say what happens when they are used."""
    handlers = LibraryHandlers(context)
    number, chosen, deleted = gr.State(CARDS_AT_ONCE), gr.State(None), gr.State([])
    with gr.Row():
        search = gr.Textbox("", label="Search", placeholder="name, title, trigger, method or base", scale=3)
        refresh = gr.Button("Refresh", scale=0, min_width=110)
        undo = gr.Button("Undo delete", interactive=False, scale=0, min_width=150)
    with gr.Accordion("Import", open=False, elem_id="library-import"):
        files = gr.File(
            label="Adapters, pictures that carry one (PNG), or LoRA, SVDiff and SVFT files", file_count="multiple"
        )
        with gr.Row():
            pattern = gr.Dropdown(
                [_DEFAULT_PATTERN, *PATTERNS], value=_DEFAULT_PATTERN, label="Of a LoRA or SVFT, keep the pattern"
            )
            off_diagonals = gr.Number(0, label="Width of the pattern, 0 for the usual", precision=0, minimum=0)
            together = gr.Checkbox(False, label="Files of other tools are parts of one adapter")
        take = gr.Button("Add to the library", variant="primary")
    result = gr.Textbox(label="Result", visible=False, interactive=False, max_lines=20, elem_id="library-result")
    with gr.Column(visible=False, elem_id="library-details") as panel:
        facts = gr.HTML(
            [],
            html_template="<pre tabindex='0' role='region' aria-label='Details'></pre>",
            css_template=asset("plain_text.css"),
            js_on_load=asset("plain_text.js"),
        )
        with gr.Row():
            history = gr.Dropdown(label="Steps that its training kept", visible=False)
            add_step = gr.Button("Add this step to Generate", visible=False)
        with gr.Row():
            check = gr.Button("Verify on the base model")
            delete = gr.Button("Delete", variant="stop")
            close = gr.Button("Close")
        with gr.Accordion("Export", open=False, elem_id="library-export"):
            with gr.Row():
                format = gr.Dropdown(EXPORT_FORMATS, value="kohya", label="Format")
                rank = gr.Textbox("auto", label="Rank", info="a number, auto or full")
                strength = gr.Number(1.0, label="Strength")
                half = gr.Checkbox(False, label="Half the size (float16)")
            write = gr.Button("Write the file")
            download = gr.DownloadButton("Download", visible=False)
    found = gr.HTML(
        None,
        html_template="<div class='library-list'></div>",
        css_template=asset("library_list.css"),
        js_on_load=asset("library_list.js"),
        elem_id="library-list",
    )

    private: dict[str, Any] = {"api_visibility": "private"}
    drawing: dict[str, Any] = {**private, "concurrency_id": QUEUE, "concurrency_limit": 1}
    listing: dict[str, Any] = {
        **private,
        "fn": handlers.listed,
        "inputs": [search, shared.base, number, chosen],
        "outputs": found,
        "show_progress": "hidden",
        "trigger_mode": "always_last",
    }

    gr.on([refresh.click, shared.base.change, chosen.change, number.change], **listing)
    found.come_into_view(**listing)
    search.change(**listing)
    found.show_more(lambda shown: shown + CARDS_AT_ONCE, number, number, **private)
    to_generate: dict[str, Any] = {**private, "outputs": shared.changes, "trigger_mode": "multiple"}
    found.add_card(handlers.add_card, [shared.cards, shared.base], **to_generate)
    add_step.click(handlers.add_step, [shared.cards, shared.base, history], **to_generate)
    found.show_details(
        handlers.show_details, outputs=[chosen, panel, facts, history, add_step, result, download], **private
    ).success(None, js=_SCROLL, **private)
    close.click(lambda: (None, gr.Column(visible=False)), outputs=[chosen, panel], **private)
    check.click(handlers.verify, [chosen, shared.base], result, **drawing)
    write.click(handlers.export, [chosen, shared.base, format, rank, strength, half], [result, download], **drawing)
    delete.click(handlers.delete, [chosen, deleted], [deleted, chosen, panel, result, undo], **private)
    undo.click(handlers.undo, deleted, [deleted, result, undo], **private).success(**listing)
    take.click(
        handlers.import_files, [files, shared.base, pattern, off_diagonals, together], [files, result], **drawing
    ).success(**listing)


def _card(entry: LibraryEntry, fit: str, state: str) -> dict[str, Any]:
    """What the page shows of an adapter: plain text, and the id that it is called by."""
    header = entry.header
    facts = {
        "method": header.method if header.pattern == "plain" else f"{header.pattern} {header.method}",
        "trigger": header.trigger,
        "base": header.base.name,
        "size": f"{entry.size / 1000:.1f} kB",
        "changed": f"{datetime.fromtimestamp(entry.modified):%Y-%m-%d %H:%M}",
        "steps": f"{entry.steps} kept" if entry.steps else None,
    }
    return {
        "id": entry.id,
        "name": printable(entry.name, _LONGEST_TITLE),
        "title": printable(header.title or entry.name, _LONGEST_TITLE),
        "facts": [[name, printable(fact, _LONGEST_FACT)] for name, fact in facts.items() if fact],
        "thumbnail": _data_uri(header.thumbnail or sample_thumbnail(entry.file)),
        "fit": fit,
        "state": state,
        "addable": True,
    }


def _note(found: int, search: str) -> str:
    if found:
        return f"{found} adapter{'s' if found > 1 else ''}"
    if search.strip():
        return "no adapter matches; search for other words"
    return "no adapter yet: train one, or import a file below"


def _data_uri(jpeg: bytes | None) -> str:
    return "" if jpeg is None else f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _report(text: str) -> Any:
    return gr.Textbox(value=text, visible=True)


def _id_of(event: gr.EventData) -> str:
    """The id that an event of the list carries; the page may send anything."""
    data = event._data
    id = data.get("id") if isinstance(data, dict) else None
    if not isinstance(id, str):
        raise UserError("choose an adapter of the list")
    return id
