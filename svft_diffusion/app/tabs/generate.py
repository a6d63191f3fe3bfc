"""Generate: a base model, adapters at weights, a prompt, and the pictures that come of them."""

from __future__ import annotations

import gradio as gr

from svft_diffusion.app.assets import asset
from svft_diffusion.app.components.stopping import stop_button
from svft_diffusion.app.context import AppContext, Shared
from svft_diffusion.app.tabs import grid
from svft_diffusion.app.tabs.generate_adapters import adapter_picker, wire_adapter_picker
from svft_diffusion.app.tabs.generate_model import model_picker, wire_model_picker
from svft_diffusion.app.tabs.generate_pictures import PictureEvents, pictures_view
from svft_diffusion.app.tabs.generate_settings import negative_prompt_field, prompt_field, settings_form


def build(context: AppContext, shared: Shared) -> None:
    """Place the tab."""
    resolution = context.studio.open_base(context.config.pretrained_model_name_or_path)
    with gr.Row():
        with gr.Column(scale=6, min_width=320):
            prompt = prompt_field()
            completion = _prompt_completion()
            negative_prompt = negative_prompt_field()
            with gr.Row():
                generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=3, min_width=140)
                stop = stop_button("stop", generate)
            with gr.Accordion("Adapters", open=True):
                adapters = adapter_picker(shared)
            with gr.Accordion("Settings", open=True):
                form = settings_form(prompt, negative_prompt, resolution)
            with gr.Accordion("Base model", open=True):
                model = model_picker(context, resolution)
        with gr.Column(scale=5, min_width=320):
            view, history = pictures_view(context)
    events = PictureEvents(context, shared, form, model)
    grid.build(context, shared, form, events.wire_recall)
    gr.HTML(None, html_template="<div></div>", js_on_load=_scripts(), elem_id="page-scripts")
    wire_model_picker(model, context, shared, [form.width, form.height])
    wire_adapter_picker(adapters, context, shared, completion)
    events.wire(view, history, generate, stop)


def _prompt_completion() -> gr.HTML:
    """Offers names of adapters below the prompt while one is typed; its value is the list of them."""
    return gr.HTML(
        [],
        html_template='<div class="completion"></div>',
        css_template=asset("prompt_completion.css"),
        js_on_load=asset("prompt_completion.js"),
        apply_default_css=False,
        elem_id="completion",
    )


def _scripts() -> str:
    return "\n".join(f"{{\n{asset(name)}\n}}" for name in ("keys.js", "picture_drop.js"))
