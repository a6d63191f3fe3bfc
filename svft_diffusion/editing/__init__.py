"""Editing one picture: by an adapter trained on it and the noise that draws it, from a noisy copy, or behind a mask."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svft_diffusion.editing.config import EditConfig
    from svft_diffusion.editing.edit import EditResult, edit_picture

__all__ = ["EditConfig", "EditResult", "edit_picture"]


def __getattr__(name: str) -> object:
    """Import a part, and with it diffusers, when it is first asked for."""
    if name in __all__:
        return getattr(import_module(f"svft_diffusion.editing.{'config' if name == 'EditConfig' else 'edit'}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
