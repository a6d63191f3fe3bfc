"""Lists to choose from that change while the page is open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

Choices = Sequence[tuple[str, str]]
"""What is shown, and what handlers are given."""


def new_choices(choices: Choices, chosen: str | None, otherwise: str | None) -> Any:
    """The list as it is now; what is chosen stays so while it is there."""
    known = [value for _, value in choices]
    return gr.update(choices=list(choices), value=chosen if chosen in known else otherwise)
