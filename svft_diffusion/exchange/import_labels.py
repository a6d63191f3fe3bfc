"""What foreign files say of themselves, in the keys of kohya and ModelSpec: words of strangers, cut to what we keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath

from svft_diffusion.exchange.foreign_file import ForeignFile

_LONGEST_NAME = 200  # characters of a title or a trigger phrase
_LONGEST_TEXT = 2000


@dataclass(frozen=True)
class Labels:
    """Text from the headers of foreign files, one line each; None where they have none.

    It is shown and stored, and never acted on: no number in it sets a strength, no name in it is looked up.
    """

    title: str | None = None
    trigger: str | None = None
    description: str | None = None  # and the hint on usage after it


def labels_of(files: Iterable[ForeignFile]) -> Labels:
    """The first title, trigger phrase and description that the files have."""
    found = [_labels(file.metadata) for file in files]
    return Labels(
        title=next((one.title for one in found if one.title), None),
        trigger=next((one.trigger for one in found if one.trigger), None),
        description=next((one.description for one in found if one.description), None),
    )


def _labels(metadata: dict[str, str]) -> Labels:
    def entry(key: str, longest: int = _LONGEST_NAME) -> str | None:
        return _one_line(metadata.get(key, ""), longest)

    title = entry("modelspec.title") or entry("ss_output_name")
    text, hint = entry("modelspec.description", _LONGEST_TEXT), entry("modelspec.usage_hint")
    usage = f"usage: {hint}" if hint else None
    return Labels(
        title=None if title is None else _without_folder(title),
        trigger=entry("modelspec.trigger_phrase"),
        description="; ".join(part for part in (text, usage) if part) or None,
    )


def _one_line(text: str, longest: int) -> str | None:
    """Printable characters with single spaces between words: no line breaks, control codes or turned directions."""
    words = "".join(letter if letter.isprintable() else " " for letter in text[: 10 * longest]).split()
    line = " ".join(words)
    return (line if len(line) <= longest else f"{line[: longest - 3].rstrip()}...") or None


def _without_folder(title: str) -> str:
    """A title that is a file's place on somebody's machine, without the folders."""
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(title).is_absolute():
            return kind(title).name or title
    return title
