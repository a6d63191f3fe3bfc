"""The page: its tabs, what they share, and how it looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from svft_diffusion.app.assets import asset
from svft_diffusion.app.components.adapter_cards import adapter_cards
from svft_diffusion.app.components.card_changes import card_changes, wire_card_changes
from svft_diffusion.app.context import AppContext, Shared
from svft_diffusion.app.serving.api import add_endpoints
from svft_diffusion.app.tabs import blend, compare, generate, library, train

_TABS: dict[str, tuple[str, Callable[[AppContext, Shared], None]]] = {
    "generate": ("Generate", generate.build),
    "blend": ("Blend", blend.build),
    "train": ("Train", train.build),
    "library": ("Library", library.build),
    "compare": ("Compare", compare.build),
}


def style() -> str:
    """The page's own style."""
    return asset("page.css")


def theme() -> gr.themes.Base:
    """Fonts of the visitor's system: nothing is fetched from elsewhere. All text has a contrast of at least 4.5."""
    default = gr.themes.Default(
        primary_hue="teal",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return default.set(
        color_accent="*primary_700",  # on a dark page: page.css
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_border_color="*primary_700",
        button_primary_border_color_dark="*primary_700",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
        body_text_color_subdued="*neutral_600",
        link_text_color="*secondary_700",
        link_text_color_active="*secondary_700",
        link_text_color_visited="*secondary_700",
        link_text_color_hover="*secondary_800",
        link_text_color_dark="*secondary_400",
        link_text_color_active_dark="*secondary_400",
        link_text_color_visited_dark="*secondary_400",
        link_text_color_hover_dark="*secondary_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def build_page(context: AppContext, cards: list[dict[str, Any]]) -> gr.Blocks:
    """The page, with the adapters of ``cards`` on it at the start."""
    with gr.Blocks(title="svft-diffusion", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown("# svft-diffusion", elem_id="title")
        shared_cards = adapter_cards(cards, render=False)
        changes = card_changes()
        base = gr.State(context.config.pretrained_model_name_or_path)
        with gr.Tabs(selected="generate", overflow_behavior="wrap") as tabs:
            for name, (label, build) in _TABS.items():
                with gr.Tab(label, id=name, elem_id=f"tab-{name}") as tab:
                    build(context, Shared(tabs, base, shared_cards, changes, tab))
        wire_card_changes(changes, shared_cards)
        gr.HTML(None, html_template="<div></div>", js_on_load=asset("accessible_names.js"), elem_id="mending-scripts")
        add_endpoints(context)
    return page
