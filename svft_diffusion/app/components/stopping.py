"""A Stop button beside one that draws; it can be pressed while something is drawn."""

from __future__ import annotations

from typing import Any

import gradio as gr

# Scripts, so that a page need not wait for the server, which may be slow to hear of it. Until it has, what is drawn
# stays in sight and says that it is about to stop: Gradio leaves out the clicks on the button that draws till then.
_STOPPING = "(drawing) => [drawing && {...drawing, stopping: true}, {__type__: 'update', interactive: false}]"
# Nothing is drawn any more, and there is nothing to stop:
_ENDED = "() => [null, {__type__: 'update', interactive: false}]"
_USABLE = "() => ({__type__: 'update', interactive: true})"


def stop_button(elem_id: str, draw: gr.Button) -> gr.Button:
    """Place it. To be called before it is said what ``draw`` does: a page does what a click asks one after the other,
    and waits for the end of each."""
    stop = gr.Button("Stop", interactive=False, elem_id=elem_id, scale=1, min_width=80)
    draw.click(None, None, stop, js=_USABLE, api_visibility="private")
    return stop


def wire_stop(stop: gr.Button, drawn: Any, drawing: gr.HTML) -> None:
    """Let it stop what has begun.

    Args:
        drawn: the event that draws.
        drawing: shows what is drawn, and nothing any more when that is over.
    """
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    for over in (drawn.then, drawn.failure):  # the first leaves out what ended by an error
        over(None, None, [drawing, stop], js=_ENDED, **quiet)
    stop.click(None, drawing, [drawing, stop], js=_STOPPING, cancels=[drawn], **quiet)
