"""Scripts and styles of the page, which lie in the package."""

from __future__ import annotations

from importlib import resources


def asset(name: str) -> str:
    """The text of a file in ``assets``."""
    return (resources.files("svft_diffusion.app") / "assets" / name).read_text(encoding="utf-8")
