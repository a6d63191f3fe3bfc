"""Whether adapters get in each other's way: asked when the set of those that are on changes, never by a slider."""

from __future__ import annotations

import gradio as gr

from svft_diffusion.app.assets import asset


def interference_line() -> gr.HTML:
    """Place the component. Its value is a list of lines; its event ``submit`` asks for them."""
    return gr.HTML(
        None,
        html_template='<div class="interference"></div>',
        css_template=asset("interference.css"),
        js_on_load=asset("interference.js"),
        apply_default_css=False,
        elem_id="interference",
    )
