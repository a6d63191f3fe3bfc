"""Train: three steps, and then what comes of it. A training is a process of its own; the page only looks on."""

from __future__ import annotations

import base64
from typing import Any

import gradio as gr
from gradio.context import Context

from svft_diffusion.app.components.adapter_cards import with_card
from svft_diffusion.app.components.card_changes import changed_cards
from svft_diffusion.app.components.training_form import TrainingForm, TrainingWishes, training_form
from svft_diffusion.app.components.training_view import (
    Seen,
    TrainingView,
    nearest,
    of_step,
    shown,
    training_view,
)
from svft_diffusion.app.context import AppContext, Shared, shows_user_errors
from svft_diffusion.app.shelf.library import id_of
from svft_diffusion.app.shelf.sample_thumbnail import sample_thumbnail
from svft_diffusion.app.shelf.uploads import called
from svft_diffusion.errors import UserError
from svft_diffusion.models.loading import base_display_name
from svft_diffusion.sampling.adapter_choice import sha256_of

# `prompt_completion.js` listens to the event.
_INTO_AN_EMPTY_PROMPT = """(text) => {
  const field = document.querySelector("#prompt textarea");
  if (text && field && !field.value.trim())
    window.dispatchEvent(new CustomEvent("svft-insert", { detail: { text } }));
}"""


def build(context: AppContext, shared: Shared) -> None:
    """Place the tab."""
    with gr.Row():
        with gr.Column(min_width=300):
            form = training_form(context, shared)
        with gr.Column(min_width=300):
            view = training_view()
    _wire(form, view, shared, _TrainingEvents(context))


def _wire(form: TrainingForm, view: TrainingView, shared: Shared, page: _TrainingEvents) -> None:
    looks = [view.choice, view.seen]
    private: dict[str, Any] = {"api_visibility": "private"}
    quiet = private | {"show_progress": "hidden"}
    form.start.click(page.start, [*form.inputs, shared.base, view.seen], view.outputs, **private)
    view.stop.click(page.stop, looks, view.outputs, **private)
    view.delete.click(lambda: gr.update(visible=True), None, view.confirm, **quiet)
    view.keep.click(lambda: gr.update(visible=False), None, view.confirm, **quiet)
    view.delete_now.click(page.delete, looks, view.outputs, **private)
    view.choice.input(page.refresh, looks, view.outputs, **quiet)
    view.timer.tick(page.refresh, looks, view.outputs, trigger_mode="once", **quiet)
    # A page that comes later, be it on another machine, and one that comes back to this tab.
    assert Context.root_block is not None
    Context.root_block.load(page.show_all, view.choice, view.outputs, **quiet)
    shared.tab.select(page.refresh, looks, view.outputs, **quiet)
    view.step.input(
        page.show_step,
        [view.choice, view.step],
        [view.step_text, view.step_samples],
        trigger_mode="always_last",
        **quiet,
    )
    view.use.click(
        page.use_step, [view.choice, view.step, shared.cards, shared.base], [shared.changes, shared.tabs], **private
    ).success(None, view.prompt, None, js=_INTO_AN_EMPTY_PROMPT, **quiet)


class _TrainingEvents:
    """What happens when something on the tab is pressed, and every second while something trains."""

    def __init__(self, context: AppContext) -> None:
        self._context = context

    @shows_user_errors
    def start(self, *values: Any) -> list[Any]:
        """Put the training into the queue, and show it."""
        *filled_in, base, seen = values
        wishes = TrainingWishes(*filled_in)
        with wishes.as_config(self._context, base) as config:
            id = self._context.jobs.start(config, wishes.shown_name)
        job = self._context.jobs.get(id)
        if job.state == "queued":
            gr.Info(f"Number {job.queue_position} in the queue: another training runs.")
        return self._shown(id, seen)

    @shows_user_errors
    def stop(self, id: str | None, seen: Seen) -> list[Any]:
        """Ask the training to stop, or take it out of the queue."""
        if id is None:
            raise UserError("choose a training from the list first")
        self._context.jobs.stop(id)
        return self._shown(id, seen)

    @shows_user_errors
    def delete(self, id: str | None, seen: Seen) -> list[Any]:
        """Remove the training for good, if it is the one that the page shows."""
        shown_id, _, created = (seen or {}).get("delete", (None, False, 0.0))
        if id is None or shown_id != id:
            raise UserError("choose a training from the list first")
        folder = self._context.jobs.get(id).folder.path
        self._context.jobs.delete(id, created)
        self._context.library.forget(folder)
        return self._shown(None, seen)

    def refresh(self, id: str | None, seen: Seen) -> list[Any]:
        """What has changed."""
        return self._shown(id, seen)

    def show_all(self, id: str | None) -> list[Any]:
        """Everything, for a page that shows nothing yet."""
        return self._shown(id, {})

    @shows_user_errors
    def show_step(self, id: str | None, step: float) -> tuple[Any, Any]:
        """One step of the history."""
        entry = nearest(self._context.jobs.get(id or "").history, step)
        if entry is None:
            raise UserError("this training has kept no steps")
        return of_step(entry)

    @shows_user_errors
    def use_step(self, id: str | None, step: float, cards: list[dict[str, Any]], base: str) -> tuple[Any, Any]:
        """Put that step's adapter beside the others on Generate, and go there. Its card shows a sample."""
        job = self._context.jobs.get(id or "")
        entry = nearest(job.history, step)
        if entry is None:
            raise UserError("this training has kept no steps")
        library = self._context.library
        with called(f"the adapter of step {entry.step}", entry.adapter):
            adapter_id = id_of(sha256_of(entry.adapter))
        try:
            adapter = library.get(adapter_id)
        except UserError:  # of a training that has no result, or outside of the library
            adapter = library.add(entry.adapter, f"{job.id}-step-{entry.step}.safetensors")
        refuses_strangers = self._context.studio.on_mismatch == "error"
        if refuses_strangers and (reason := library.fits(adapter, base)) is not None:
            raise UserError(f"{reason}; choose {base_display_name(job.base)} as the base model on Generate")
        if any(card.get("id") == adapter.id for card in cards or []):
            return gr.skip(), gr.Tabs(selected="generate")
        card = with_card(cards or [], adapter)[-1]
        if not card["thumbnail"] and (jpeg := sample_thumbnail(entry.adapter, entry.step)) is not None:
            card["thumbnail"] = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
        return changed_cards(added=[card]), gr.Tabs(selected="generate")

    def _shown(self, id: str | None, seen: Seen) -> list[Any]:
        return shown(self._context.jobs.jobs(), id, seen or {})
