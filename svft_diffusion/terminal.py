"""Showing text from files of others on a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


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


@contextlib.contextmanager
def output_may_vanish() -> Iterator[None]:
    """While entered, what nobody can read any more is lost without an error: no work ends for want of a reader.

    Ctrl-C in ``program 2>&1 | tee log`` ends ``tee`` too, and a terminal can be closed at any time.
    """
    with (
        contextlib.redirect_stdout(cast(TextIO, _Forgiving(sys.stdout))),
        contextlib.redirect_stderr(cast(TextIO, _Forgiving(sys.stderr))),
    ):
        yield


class _Forgiving:
    """A text stream whose reader may go."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
