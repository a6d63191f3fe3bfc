"""What a picture tells of its making, as text whatever it is, and what of it could not be recalled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from svft_diffusion.app.assets import asset
from svft_diffusion.app.drawing.gallery import Details


def picture_details(elem_id: str = "details") -> gr.HTML:
    """Place the component; it shows values of `details_value`."""
    return gr.HTML(
        None,
        html_template='<div class="details"></div>',
        css_template=asset("picture_details.css"),
        js_on_load=asset("picture_details.js"),
        apply_default_css=False,
        elem_id=elem_id,
    )


def details_value(details: Details, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The value of the component."""
    return {"details": [list(pair) for pair in details], "notes": list(notes)}
