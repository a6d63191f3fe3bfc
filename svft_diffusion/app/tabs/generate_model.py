"""The base model of a visitor: chosen from those on offer or, where the page is the owner's alone, named."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import gradio as gr

from svft_diffusion.app.components.adapter_cards import Card, with_warnings
from svft_diffusion.app.components.card_changes import changed_cards
from svft_diffusion.app.context import QUEUE, AppContext, Shared, shows_user_errors
from svft_diffusion.app.offered_bases import OfferedBases
from svft_diffusion.markdown import plain


@dataclass(frozen=True)
class ModelPicker:
    """What the page shows of the base model."""

    name: gr.Dropdown
    load: gr.Button
    status: gr.Markdown


def model_picker(context: AppContext, resolution: int) -> ModelPicker:
    """Place it, with the first base model loaded, which draws at ``resolution``."""
    config, bases = context.config, OfferedBases(context.config)
    first = config.pretrained_model_name_or_path
    with gr.Row():
        name = gr.Dropdown(
            bases.labels,
            value=bases.label(first),
            label="Base model",
            info=None if config.open_to_others else "One of the list, a diffusers folder, a checkpoint or a Hub name",
            allow_custom_value=not config.open_to_others,
            elem_id="base-model",
            scale=4,
            min_width=180,
        )
        load = gr.Button("Load", size="md", elem_id="load-base", elem_classes="beside-field", scale=1, min_width=80)
    return ModelPicker(name, load, gr.Markdown(_loaded(bases.label(first), resolution), elem_id="base-status"))


def wire_model_picker(picker: ModelPicker, context: AppContext, shared: Shared, sizes: list[Any]) -> None:
    """Load what is chosen.

    Args:
        sizes: width and height, which become those that the base draws at by itself.
    """
    page = ModelEvents(context)
    gr.on(
        [picker.load.click, picker.name.select],
        page.load,
        [picker.name, shared.cards],
        [shared.base, picker.status, shared.changes, *sizes],
        show_progress_on=picker.status,
        concurrency_id=QUEUE,
        concurrency_limit=1,
        api_visibility="private",
    )


class ModelEvents:
    """What happens when another base model is chosen."""

    def __init__(self, context: AppContext) -> None:
        self._context = context
        self._bases = OfferedBases(context.config)

    @shows_user_errors
    def load(self, text: str | None, cards: list[Card]) -> list[Any]:
        """Load the base model; adapters that do not fit it leave."""
        base = self._bases.named(text or "")
        resolution = self._context.studio.open_base(base)
        unfit = self._unfit(cards, base)
        status = _loaded(self._bases.label(base), resolution)
        leave = changed_cards(removed=[str(card.get("id")) for card in unfit]) if unfit else gr.skip()
        return [base, status, leave, resolution, resolution]

    def _unfit(self, cards: list[Card], base: str) -> list[Card]:
        judged = with_warnings(cards, self._context.library, base, self._context.studio.on_mismatch)
        unfit = [card for card in judged if card["warning"]]
        if unfit:
            names = html.escape(", ".join(str(card.get("name")) for card in unfit), quote=False)
            gr.Warning(f"Removed, because they don't fit this base model: {names}")
        return unfit


def loads_later(label: str) -> str:
    """What is said of a base model that a picture's settings brought back."""
    return f"{plain(label)} loads with the next picture"


def _loaded(label: str, resolution: int) -> str:
    return f"Loaded: {plain(label)}, {resolution} x {resolution} pixels"
