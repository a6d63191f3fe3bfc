"""Blend: the adapters of the cards together, by their weights on a pad, and as one new adapter."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from svft_diffusion.algebra.blending import BlendFacts
from svft_diffusion.algebra.interference import Interference
from svft_diffusion.algebra.interference_plot import plot_png
from svft_diffusion.algebra.interference_report import meetings_table, report_lines
from svft_diffusion.app.components.adapter_cards import Card, chosen_adapters, multiplied, with_card
from svft_diffusion.app.components.card_changes import changed_cards
from svft_diffusion.app.components.drawing_progress import DrawingProgress, drawing_progress, drawing_status
from svft_diffusion.app.components.prompt_following import follow_prompt
from svft_diffusion.app.components.stopping import stop_button, wire_stop
from svft_diffusion.app.components.weight_pad import weight_pad
from svft_diffusion.app.context import QUEUE, AppContext, Shared, shows_user_errors
from svft_diffusion.app.drawing.picture_request import PictureRequest, SavedPicture, words_on
from svft_diffusion.app.shelf.blend_actions import Chosen, balancing_factors, export_blend, interference_of, save_blend
from svft_diffusion.app.tabs.generate_settings import PictureWishes
from svft_diffusion.errors import UserError
from svft_diffusion.exchange.lora_keys import FORMATS
from svft_diffusion.sampling.prompt_syntax import split_prompt

_FORMATS = [("LoRA, kohya", "kohya"), ("LoRA, diffusers", "diffusers"), ("LoRA, ComfyUI", "comfy-full")]
_USUAL = PictureRequest(base="", prompt="")

Replaced = list[list[Card]]
"""The cards in whose place blends were put, the last ones last."""


def build(context: AppContext, shared: Shared) -> None:
    """Place the tab."""
    assert {name for _, name in _FORMATS} == set(FORMATS)
    with gr.Row():
        with gr.Column(min_width=320):
            weight_pad(shared.cards)
        with gr.Column(min_width=320):
            preview = _preview_form()
    with gr.Accordion("How the adapters get on", open=False):
        comparison = _comparison_view()
    with gr.Accordion("Make one adapter of them", open=False):
        keeping = _keeping_form()
    events = BlendEvents(context)
    _wire_preview(preview, shared, events)
    _wire_comparison(comparison, shared, events)
    _wire_keeping(keeping, shared, events)


@dataclass(frozen=True)
class _PreviewForm:
    prompt: gr.Textbox
    seed: gr.Textbox  # a number field loses digits of long ones
    steps: gr.Number
    guidance: gr.Number
    draw: gr.Button
    stop: gr.Button
    status: gr.Markdown
    drawing: gr.HTML
    picture: gr.Image


@dataclass(frozen=True)
class _ComparisonView:
    compare: gr.Button
    balance: gr.Button
    table: gr.Dataframe
    plot: gr.Image
    text: gr.Textbox


@dataclass(frozen=True)
class _KeepingForm:
    name: gr.Textbox
    title: gr.Textbox
    trigger: gr.Textbox
    save: gr.Button
    replace: gr.Button
    bring_back: gr.Button
    result: gr.Textbox
    format: gr.Dropdown
    rank: gr.Textbox
    half: gr.Checkbox
    export: gr.Button
    download: gr.DownloadButton
    saved: gr.State  # id of the blend, or None
    before: gr.State  # Replaced


def _preview_form() -> _PreviewForm:
    narrow: dict[str, Any] = {"min_width": 90}
    prompt = gr.Textbox(
        label="Prompt", placeholder="a photo of a red robot on the beach", lines=2, max_lines=6, elem_id="blend-prompt"
    )
    with gr.Row(equal_height=True):
        seed = gr.Textbox(str(_USUAL.seed), label="Seed", max_lines=1, elem_id="blend-seed", **narrow)
        steps = gr.Number(_USUAL.num_inference_steps, label="Steps", precision=0, elem_id="blend-steps", **narrow)
        guidance = gr.Number(_USUAL.guidance_scale, label="Guidance", step=0.5, elem_id="blend-guidance", **narrow)
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="blend-draw", scale=3, min_width=140)
        stop = stop_button("blend-stop", draw)
    status = drawing_status("blend-status")
    drawing = drawing_progress("blend-drawing")
    picture = gr.Image(
        label="Picture at these weights",
        type="filepath",
        format="png",
        interactive=False,
        height=420,
        buttons=["download", "fullscreen"],
        elem_id="blend-picture",
    )
    return _PreviewForm(prompt, seed, steps, guidance, draw, stop, status, drawing, picture)


def _comparison_view() -> _ComparisonView:
    gr.Markdown(
        "*Cosine*: +1 where two adapters pull alike, \N{MINUS SIGN}1 where one undoes the other. "
        "*Overlap*: 1 where they change the same places, 0 where they share none."
    )
    with gr.Row():
        compare = gr.Button("Compare at these weights", elem_id="blend-compare")
        balance = gr.Button("Balance the weights", elem_id="blend-balance")
    table = gr.Dataframe(
        headers=["Adapters", "Place", "Cosine", "Overlap"],
        datatype=["str", "str", "number", "number"],
        label="Meetings of two",
        interactive=False,
        visible=False,
        max_height=400,
        elem_id="blend-meetings",
    )
    plot = gr.Image(label="Cosine and overlap", format="png", interactive=False, visible=False, elem_id="blend-plot")
    text = gr.Textbox(
        label="Report", interactive=False, visible=False, max_lines=30, elem_id="blend-report", elem_classes="report"
    )
    return _ComparisonView(compare, balance, table, plot, text)


def _keeping_form() -> _KeepingForm:
    with gr.Row():
        name = gr.Textbox(label="Name", placeholder="blend", max_length=80, elem_id="blend-name", min_width=160)
        title = gr.Textbox(label="Title", placeholder="from its parts", max_length=200, min_width=160)
        trigger = gr.Textbox(label="Trigger", placeholder="those of its parts", max_length=200, min_width=160)
    with gr.Row():
        save = gr.Button("Save into the library", variant="primary", elem_id="blend-save")
        replace = gr.Button("Put it in place of the cards", interactive=False, elem_id="blend-replace")
        bring_back = gr.Button("Bring the cards back", interactive=False, elem_id="blend-bring-back")
    with gr.Row(equal_height=True):
        format = gr.Dropdown(_FORMATS, value="kohya", label="Export as", min_width=160)
        rank = gr.Textbox("auto", label="Rank", info="a number, auto or full", min_width=160)
        half = gr.Checkbox(False, label="Half the size (float16)", min_width=160)
    with gr.Row():
        export = gr.Button("Export", elem_id="blend-export")
        download = gr.DownloadButton("Download", visible=False, elem_id="blend-download")
    result = gr.Textbox(
        label="Result", visible=False, interactive=False, max_lines=20, elem_id="blend-result", elem_classes="report"
    )
    saved, before = gr.State(None), gr.State([])
    return _KeepingForm(
        name, title, trigger, save, replace, bring_back, result, format, rank, half, export, download, saved, before
    )


_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_QUEUED: dict[str, Any] = {**_PRIVATE, "concurrency_id": QUEUE, "concurrency_limit": 1}


def _wire_preview(form: _PreviewForm, shared: Shared, events: BlendEvents) -> None:
    settings = [form.prompt, form.seed, form.steps, form.guidance]
    drawn = form.draw.click(
        events.draw,
        [shared.base, shared.cards, *settings],
        [form.drawing, form.status, form.picture],
        show_progress_on=form.status,
        **_QUEUED,
    )
    wire_stop(form.stop, drawn, form.drawing)
    follow_prompt(shared.tabs, form.prompt, "blend")


def _wire_comparison(view: _ComparisonView, shared: Shared, events: BlendEvents) -> None:
    given = [shared.base, shared.cards]
    found = [view.table, view.plot, view.text]
    view.compare.click(events.compare, given, found, **_QUEUED)
    view.balance.click(events.balance, given, [shared.changes, *found], **_QUEUED)


def _wire_keeping(form: _KeepingForm, shared: Shared, events: BlendEvents) -> None:
    given = [shared.base, shared.cards, form.name]
    form.save.click(
        events.save,
        [*given, form.title, form.trigger],
        [form.saved, form.replace, form.result, form.download],
        **_QUEUED,
    )
    form.export.click(
        events.export, [*given, form.format, form.rank, form.half], [form.result, form.download], **_QUEUED
    )
    swapped = [shared.cards, form.before, form.bring_back]
    form.replace.click(events.replace_cards, [form.saved, shared.cards, form.before], swapped, **_PRIVATE)
    form.bring_back.click(events.bring_back, form.before, swapped, **_PRIVATE)


class BlendEvents:
    """What happens when something on the tab is pressed."""

    def __init__(self, context: AppContext) -> None:
        self._context = context

    @shows_user_errors
    def draw(
        self, base: str, cards: object, prompt: str, seed: str, steps: int | None, guidance: float | None
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Draw one picture, and show how it comes. Closing it ends the drawing within a step."""
        if split_prompt(prompt or "")[1]:
            raise UserError("here the weights are those of the pad; leave <adapter:...> out of the prompt")
        library, studio = self._context.library, self._context.studio
        wishes = PictureWishes(prompt, "", seed, False, 1, steps, guidance, width=None, height=None, scheduler=None)
        request = wishes.request(base, cards, library, studio.on_mismatch)
        progress = DrawingProgress(1, request.num_inference_steps)
        yield progress.started(), "", gr.skip()
        with closing(studio.draw(request, previews=True)) as events:
            for event in events:
                if isinstance(event, SavedPicture):
                    yield gr.skip(), words_on([event]), str(event.path)
                elif (value := progress.after(event)) is not None:
                    yield value, gr.skip(), gr.skip()

    @shows_user_errors
    def compare(self, base: str, cards: object) -> tuple[Any, ...]:
        """Report how the adapters get on."""
        return self._report(interference_of(self._context, base, self._chosen(base, cards)))

    @shows_user_errors
    def balance(self, base: str, cards: object) -> tuple[Any, ...]:
        """Set the balancing weights, and report on these."""
        factors = balancing_factors(self._context, base, self._chosen(base, cards))
        balanced = multiplied(cards, factors)
        weights = {card["id"]: card["weight"] for card in balanced if card.get("id") in factors}
        return changed_cards(weights=weights), *self._report(
            interference_of(self._context, base, self._chosen(base, balanced))
        )

    @shows_user_errors
    def save(self, base: str, cards: object, name: str, title: str, trigger: str) -> tuple[Any, ...]:
        """Save the blend as a new adapter."""
        facts = BlendFacts((title or "").strip() or None, (trigger or "").strip() or None)
        entry, lines = save_blend(self._context, base, self._chosen(base, cards), name or "", facts)
        return entry.id, gr.Button(interactive=True), _result(lines), gr.DownloadButton(visible=False)

    @shows_user_errors
    def export(self, base: str, cards: object, name: str, format: str, rank: str, half: bool) -> tuple[Any, Any]:
        """Export the blend as a LoRA, and offer the file."""
        chosen = self._chosen(base, cards)
        file, report = export_blend(self._context, base, chosen, name or "", format=format, rank=rank, half=bool(half))
        return _result([report]), gr.DownloadButton(value=str(file), visible=True)

    @shows_user_errors
    def replace_cards(self, saved: str | None, cards: list[Card], before: Replaced) -> tuple[Any, ...]:
        """Let the blend stand where its parts were."""
        if not saved:
            raise UserError("save the blend first")
        blend = with_card([], self._context.library.get(saved), 1.0)
        return blend, [*before, cards], gr.Button(interactive=True)

    @shows_user_errors
    def bring_back(self, before: Replaced) -> tuple[Any, ...]:
        """Undo the last `replace_cards` that is not undone."""
        if not before:
            raise UserError("there is nothing to bring back any more")
        *earlier, cards = before
        return cards, earlier, gr.Button(interactive=bool(earlier))

    def _chosen(self, base: str, cards: object) -> Chosen:
        return chosen_adapters(cards, self._context.library, base, self._context.studio.on_mismatch)

    def _report(self, found: Interference) -> tuple[Any, Any, Any]:
        lines = report_lines(found, with_table=False)
        table = [[pair, place, *map(_rounded, numbers)] for pair, place, *numbers in meetings_table(found)]
        plot = None
        if found.pairs:
            try:
                plot = Image.open(io.BytesIO(plot_png(found)))
            except UserError as problem:
                lines += ["", str(problem)]
        return (
            gr.Dataframe(value=table, visible=bool(table)),
            gr.Image(value=plot, visible=plot is not None),
            gr.Textbox(value="\n".join(lines).strip(), visible=True),
        )


def _rounded(number: Any) -> float | None:
    return None if number is None else round(number, 3)


def _result(lines: list[str]) -> Any:
    return gr.Textbox(value="\n".join(lines), visible=True)
