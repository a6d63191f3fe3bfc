"""Which prompt describes which photo: one for all, or captions from text files or ``metadata.jsonl``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from svft_diffusion.data.photos import PhotoFolder
from svft_diffusion.errors import UserError
from svft_diffusion.settings import nearest_hint

CAPTION_SOURCES = ("none", "txt", "metadata")
METADATA_FILE = "metadata.jsonl"


@dataclass(frozen=True)
class Captions:
    """The captions of a folder's photos, and the files they come from."""

    by_name: dict[str, str] = field(default_factory=dict)  # a photo's file name -> its whole prompt
    files: frozenset[Path] = frozenset()


def read_captions(folder: Path, found: PhotoFolder, caption_source: str, *, required: bool = True) -> Captions:
    """The captions of the photos that have one.

    Args:
        caption_source: ``none``; ``txt``: ``dog.txt`` holds the prompt of ``dog.jpg``; ``metadata``: each line of
            ``metadata.jsonl`` is ``{"file_name": "dog.jpg", "text": "..."}``, as image folders on the Hub have it.
        required: whether ``metadata.jsonl`` must be there when it is asked for.

    Raises:
        UserError: a caption file is missing, empty, not readable as UTF-8, or wrong in a line that is named.
    """
    if caption_source == "txt":
        sidecars = {photo: photo.with_suffix(".txt") for photo in found.photos}
        there = {photo: sidecar for photo, sidecar in sidecars.items() if sidecar.is_file()}
        texts = {photo.name: _text_of(sidecar) for photo, sidecar in there.items()}
        return Captions(texts, frozenset(there.values()))
    if caption_source == "metadata":
        file = folder / METADATA_FILE
        if not file.is_file() and not required:
            return Captions()
        return Captions(_read_metadata(file, found), frozenset({file}))
    return Captions()


def likely_caption_source(folder: Path, found: PhotoFolder) -> str | None:
    """The source that would find captions of a folder's photos, if there is one."""
    if any(photo.with_suffix(".txt").is_file() for photo in found.photos):
        return "txt"
    return "metadata" if (folder / METADATA_FILE).is_file() else None


def _text_of(sidecar: Path) -> str:
    try:
        caption = " ".join(sidecar.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"the caption file {sidecar} can't be read as UTF-8 text: {problem}") from None
    if not caption:
        raise UserError(f"the caption file {sidecar} is empty; write the photo's prompt into it or remove it")
    return caption


def _read_metadata(file: Path, found: PhotoFolder) -> dict[str, str]:
    try:
        # Not splitlines(), which also splits at characters that JSON allows inside a text.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"--caption_source metadata needs {file}, which is not there") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"{file} can't be read as UTF-8 text: {problem}") from None
    usable = {photo.name for photo in found.photos}
    known = usable | {skipped.path.name for skipped in found.skipped}
    captions: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, caption = _entry(line, f"{file}, line {number}")
        if name not in known:
            raise UserError(f"{file}, line {number}: no file {name!r} in the folder{nearest_hint(name, usable)}")
        if name in captions:
            raise UserError(f"{file}, line {number}: {name!r} has a line already; remove one of them")
        captions[name] = caption
    if not captions.keys() & usable:
        raise UserError(f'{file} holds no caption; write a line {{"file_name": "...", "text": "..."}} for each photo')
    return captions


def _entry(line: str, place: str) -> tuple[str, str]:
    """File name and caption of one line; fields beside these two are other programs' business."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{place}: no JSON: {problem}") from None
    if not isinstance(entry, dict):
        raise UserError(f'{place}: expected an object such as {{"file_name": "dog.jpg", "text": "a photo of sks dog"}}')
    for key in ("file_name", "text"):
        if key not in entry:
            raise UserError(f"{place}: {key!r} is missing{nearest_hint(key, map(str, entry))}")
        if not isinstance(entry[key], str) or not entry[key].strip():
            raise UserError(f"{place}: {key!r} must be a text that is not empty, got {entry[key]!r}")
    return entry["file_name"], " ".join(entry["text"].split())
