"""The before-and-after slider of Generate: one seed at two weights, one picture over the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import gradio as gr

from svft_diffusion.app.components.choices import new_choices
from svft_diffusion.app.components.drawing_progress import DrawingProgress, drawing_progress, drawing_status
from svft_diffusion.app.components.stopping import stop_button, wire_stop
from svft_diffusion.app.context import QUEUE, AppContext, Shared, shows_user_errors
from svft_diffusion.app.drawing.drawing_series import (
    cards_by_id,
    draw_series,
    label_of,
    refuse_tags,
    with_factor,
    with_weights,
)
from svft_diffusion.app.drawing.picture_request import SavedPicture, words_on
from svft_diffusion.app.tabs.generate_settings import PictureWishes, SettingsForm
from svft_diffusion.errors import UserError

_ALL = "all"


def build(context: AppContext, shared: Shared, form: SettingsForm) -> None:
    """Place the accordion."""
    with gr.Accordion("Before and after", open=False, elem_id="before-after") as accordion:
        with gr.Row():
            adapter = gr.Dropdown(
                _adapters(None), value=_ALL, label="Weight of", elem_id="before-after-adapter", min_width=180
            )
            numbers: dict[str, Any] = {"step": 0.05, "min_width": 110}
            before = gr.Number(0.0, label="Before", elem_id="before-weight", **numbers)
            after = gr.Number(1.0, label="After", elem_id="after-weight", **numbers)
        with gr.Row():
            draw = gr.Button("Draw both", variant="primary", elem_id="before-after-draw", scale=3, min_width=140)
            stop = stop_button("before-after-stop", draw)
        status = drawing_status("before-after-status")
        drawing = drawing_progress("before-after-drawing")
        slider = gr.ImageSlider(
            label="Before",
            format="png",
            type="filepath",
            interactive=False,
            visible=False,
            max_height=640,
            elem_id="before-after-slider",
        )
    page = BeforeAfterEvents(context)
    private: dict[str, Any] = {"api_visibility": "private"}
    quiet: dict[str, Any] = private | {"show_progress": "hidden"}
    gr.on([accordion.expand, adapter.focus], page.adapters, [shared.cards, adapter], adapter, **quiet)
    drawn = draw.click(
        page.draw,
        [shared.base, shared.cards, adapter, before, after, *form.inputs],
        [drawing, status, slider],
        concurrency_id=QUEUE,
        concurrency_limit=1,
        show_progress_on=status,
        **private,
    )
    wire_stop(stop, drawn, drawing)


class BeforeAfterEvents:
    """What happens when something in the accordion is used."""

    def __init__(self, context: AppContext) -> None:
        self._context = context

    def adapters(self, cards: object, chosen: str | None) -> Any:
        """The adapters that are on cards now."""
        return new_choices(_adapters(cards), chosen, _ALL)

    @shows_user_errors
    def draw(
        self, base: str, cards: object, adapter: str | None, before: float | None, after: float | None, *values: Any
    ) -> Iterator[list[Any]]:
        """Draw and save both pictures. Closing it ends the drawing within a step."""
        if before is None or after is None:
            raise UserError("before and after each need a weight")
        given = cards_by_id(cards)
        if not given:
            raise UserError("there is no adapter whose weight could change; add one under Adapters")
        wishes = replace(PictureWishes(*values).with_seed(), num_images=1, random_seed=False)
        all_of_them = adapter in (None, _ALL)
        if all_of_them and not any(card.get("on") is True for card in given.values()):
            raise UserError("no adapter is on, so none can change the picture; switch one on under Adapters")
        refuse_tags(wishes.prompt or "", [card for id, card in given.items() if all_of_them or adapter == id])
        sides = [
            with_factor(cards, weight) if all_of_them else with_weights(cards, {str(adapter): weight})
            for weight in (before, after)
        ]
        library, studio = self._context.library, self._context.studio
        requests = [wishes.request(base, side, library, studio.on_mismatch) for side in sides]
        progress = DrawingProgress(len(requests), [request.num_inference_steps for request in requests])
        yield [progress.started(), "", gr.skip()]
        saved: list[SavedPicture] = []
        with closing(draw_series(studio, requests)) as events:
            for event in events:
                if isinstance(event, SavedPicture):
                    saved.append(event)
                elif (value := progress.after(event)) is not None:
                    yield [value, gr.skip(), gr.skip()]
        label = f"{before:g} on the left, {after:g} on the right, seed {requests[0].seed}"
        files = tuple(str(picture.path) for picture in saved)
        yield [gr.skip(), words_on(saved), gr.update(value=files, label=label, visible=True)]


def _adapters(cards: object) -> list[tuple[str, str]]:
    """Whose weight may change: labels, and what the handler is given."""
    labels = [(label_of(card), id) for id, card in cards_by_id(cards).items()]
    return [("All adapters that are on, times", _ALL), *labels]
