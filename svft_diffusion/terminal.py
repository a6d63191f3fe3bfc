"""Showing text from files of others on a terminal."""

from __future__ import annotations

import json
from typing import Any


def printable(text: str, longest: int | None = None) -> str:
    """``text`` on one line that a terminal shows and does not obey: other characters become escapes such as ``\\x1b``.

    Control characters move the cursor, rename the window or answer questions, and bidirectional marks change the order
    in which a line is read; none of them counts as printable in Python, nor do line breaks and unpaired surrogates.

    Args:
        longest: characters of ``text`` after which it is cut, with three dots; None: as long as it is.
    """
    shown = text if longest is None or len(text) <= longest else f"{text[:longest]}..."
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in shown
    )


def json_text(value: Any) -> str:
    """``value`` as JSON of many lines. All but ASCII letters and marks is escaped, so that no terminal obeys it."""
    return json.dumps(value, indent=2, ensure_ascii=True)
