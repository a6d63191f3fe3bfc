"""What is being drawn at the moment: a small picture of it, how far it is, and how long it takes."""

from __future__ import annotations

import base64
import io
import secrets
import time
from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image

from svft_diffusion.app.assets import asset
from svft_diffusion.app.drawing.background import Waiting
from svft_diffusion.app.drawing.picture_request import Step

_SHORTEST_PAUSE = 0.1  # seconds between two pictures of the same drawing
_JPEG_QUALITY = 80


def drawing_progress(elem_id: str = "drawing") -> gr.HTML:
    """Place the component; it shows what `DrawingProgress` makes, and nothing for None."""
    return gr.HTML(
        None,
        html_template='<div class="drawing"></div>',
        css_template=asset("drawing_progress.css"),
        js_on_load=asset("drawing_progress.js"),
        apply_default_css=False,
        elem_id=elem_id,
    )


def drawing_status(elem_id: str) -> gr.Markdown:
    """Place a line on how a drawing went, which shows the place in the queue while it waits.

    The component of `drawing_progress` can't: it is hidden until something is drawn.
    """
    return gr.Markdown(elem_id=elem_id)


class DrawingProgress:
    """Follows one drawing.

    Args:
        steps: of every picture, or of each.
    """

    def __init__(self, num_images: int, steps: int | Sequence[int]) -> None:
        self._id = secrets.token_hex(4)  # by which the page knows what comes late, of a drawing that was stopped
        self._num_images = num_images
        self._steps = [steps] * num_images if isinstance(steps, int) else list(steps)
        self._began: float | None = None  # when the first step was done: loading is no measure of speed
        self._shown = 0.0
        self._preview = ""

    def started(self) -> dict[str, Any]:
        """The value of the component before the first step."""
        return self._value("Preparing", 0)

    def after(self, step: Step | Waiting) -> dict[str, Any] | None:
        """The value after a step, or that it stays as it is; None if it is too soon after the last one."""
        if isinstance(step, Waiting):
            return gr.skip()
        now = time.monotonic()
        if self._began is None:
            self._began = now
        if now - self._shown < _SHORTEST_PAUSE:
            return None
        self._shown = now
        if step.preview is not None:
            self._preview = _data_uri(step.preview)
        steps = self._steps[step.picture]
        done = sum(self._steps[: step.picture]) + min(step.step, steps)
        text = f"Picture {step.picture + 1} of {self._num_images}, " if self._num_images > 1 else ""
        text += f"step {min(step.step, steps)} of {steps}"
        if done > 1:
            left = (now - self._began) / (done - 1) * (sum(self._steps) - done)
            text += f", about {_in_words(left)} left"
        return self._value(text, done)

    def _value(self, text: str, done: int) -> dict[str, Any]:
        return {"id": self._id, "picture": self._preview, "text": text, "done": done, "total": sum(self._steps)}


def _in_words(seconds: float) -> str:
    seconds = max(1, round(seconds))
    return f"{seconds} s" if seconds < 120 else f"{round(seconds / 60)} min"


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
