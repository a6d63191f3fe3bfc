"""The layout of the page, and which event calls which handler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from svft_diffusion.app.cards import Card, Slots, build_card
from svft_diffusion.app.handlers import Handlers
from svft_diffusion.app.studio import MOST_PICTURES, PictureRequest

# Events that use the pipeline wait for each other in one queue, where visitors see their position.
_PIPELINE_QUEUE = "pipeline"

STYLE = """
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto !important; }
/* An adapter's title has a line of its own above its number. */
.adapter-card .head { flex-wrap: wrap; row-gap: 4px; }
.adapter-card .head > label { flex: 1 0 100%; }
.adapter-card { align-items: center; }
/* The page scrolls, not the gallery in it. */
#pictures .grid-wrap { min-height: 0; max-height: none; }
/* One link in the footer needs no separator. */
footer .divider { display: none; }
"""


def theme() -> gr.themes.Base:
    """Fonts of the visitor's system: nothing is fetched from elsewhere."""
    return gr.themes.Default(
        primary_hue="teal",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


@dataclass(frozen=True)
class _PictureControls:
    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    button: gr.Button
    gallery: gr.Gallery
    status: gr.Markdown


@dataclass(frozen=True)
class _AdapterControls:
    library: gr.Dropdown
    add: gr.Button
    refresh: gr.Button
    upload: gr.UploadButton
    cards: list[Card]

    def card_components(self) -> list[Any]:
        """What `cards.card_updates` updates, in its order."""
        return [component for card in self.cards for component in (card.row, card.weight)]


def build_page(handlers: Handlers, base: str, base_status: str, slots: Slots) -> gr.Blocks:
    """The page, with ``base`` loaded and the adapters in ``slots`` on it."""
    with gr.Blocks(title="svft-diffusion", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        visitor_base, visitor_slots = gr.State(base), gr.State(slots)
        gr.Markdown("# svft-diffusion\nGenerate pictures with any mix of adapters on one base model.")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                pictures = _picture_controls()
            with gr.Column(scale=2, min_width=320):
                adapters = _adapter_controls(handlers, slots)
                numbers = _number_controls()
                base_name, load, status = _base_controls(base, base_status)

        gr.on(
            [load.click, base_name.submit],
            handlers.load_base,
            [base_name, visitor_slots],
            [visitor_base, status, visitor_slots, *adapters.card_components()],
            api_name="load_base",
            concurrency_id=_PIPELINE_QUEUE,
            show_progress_on=status,
        )
        page.load(handlers.refresh_library, None, adapters.library, api_visibility="private", show_progress="hidden")
        _connect_adapters(handlers, adapters, visitor_base, visitor_slots)
        weights = [card.weight for card in adapters.cards]
        gr.on(
            [pictures.button.click, pictures.prompt.submit],
            handlers.generate,
            [visitor_base, visitor_slots, pictures.prompt, pictures.negative_prompt, *numbers, *weights],
            [pictures.gallery, pictures.status],
            api_name="generate",
            concurrency_id=_PIPELINE_QUEUE,
            concurrency_limit=1,
            show_progress_on=pictures.gallery,
        )
    return page


def _picture_controls() -> _PictureControls:
    prompt = gr.Textbox(label="Prompt", placeholder="a photo of a red robot on the beach", lines=2)
    negative_prompt = gr.Textbox(label="Negative prompt", placeholder="what to avoid (optional)", lines=1)
    button = gr.Button("Generate", variant="primary")
    gallery = gr.Gallery(
        label="Pictures",
        elem_id="pictures",
        # Files go out as they were saved, with the settings inside.
        format="png",
        columns=2,
        height="auto",
        object_fit="contain",
        interactive=False,
        buttons=["download", "download_all", "fullscreen"],
    )
    return _PictureControls(prompt, negative_prompt, button, gallery, gr.Markdown())


def _adapter_controls(handlers: Handlers, slots: Slots) -> _AdapterControls:
    with gr.Accordion("Adapters", open=True):
        cards = [build_card(adapter) for adapter in slots]
        library = gr.Dropdown(handlers.library(), value=None, label="Adapter from the adapters folder")
        with gr.Row():
            add = gr.Button("Add", size="sm", min_width=80)
            refresh = gr.Button("Refresh list", size="sm", min_width=80)
            upload = gr.UploadButton(
                "Upload files", size="sm", min_width=80, file_types=[".safetensors", ".png"], file_count="multiple"
            )
    return _AdapterControls(library, add, refresh, upload, cards)


def _number_controls() -> list[Any]:
    """Seed, number of pictures, steps and guidance, in the order of `Handlers.generate`."""
    default = PictureRequest(base="", prompt="")
    with gr.Accordion("Settings", open=True):
        with gr.Row():
            seed = gr.Number(default.seed, label="Seed of the first picture", precision=0, minimum=0, min_width=140)
            num_images = gr.Slider(1, MOST_PICTURES, 4, step=1, label="Number of pictures", min_width=140, buttons=[])
        with gr.Row():
            steps = gr.Slider(1, 100, default.num_inference_steps, step=1, label="Steps", min_width=140, buttons=[])
            guidance = gr.Slider(0, 20, default.guidance_scale, step=0.5, label="Guidance", min_width=140, buttons=[])
    return [seed, num_images, steps, guidance]


def _base_controls(base: str, base_status: str) -> tuple[gr.Textbox, gr.Button, gr.Markdown]:
    with gr.Accordion("Base model", open=True):
        name = gr.Textbox(base, label="toybox, a diffusers folder, or a Hugging Face Hub name", max_lines=1)
        load = gr.Button("Load", size="md")
        status = gr.Markdown(base_status)
    return name, load, status


def _connect_adapters(handlers: Handlers, adapters: _AdapterControls, base: gr.State, slots: gr.State) -> None:
    outputs = [slots, *adapters.card_components()]
    adapters.add.click(
        handlers.add_from_library,
        [adapters.library, base, slots],
        outputs,
        api_name="add_adapter",
        show_progress="hidden",
    )
    adapters.upload.upload(
        handlers.add_uploads,
        [adapters.upload, base, slots],
        outputs,
        api_name="upload_adapters",
        show_progress="hidden",
    )
    adapters.refresh.click(handlers.refresh_library, None, adapters.library, api_visibility="private")
    for number, card in enumerate(adapters.cards):
        slot = gr.State(number)
        card.remove.click(
            handlers.remove, [slot, slots], outputs, api_visibility="private", queue=False, show_progress="hidden"
        )
