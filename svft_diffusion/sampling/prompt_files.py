"""Lists of prompts in files, and the words of the subject that go into them."""

from __future__ import annotations

import csv
import difflib
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svft_diffusion.errors import UserError
from svft_diffusion.settings import config_from_mapping, nearest_hint, setting
from svft_diffusion.structured_files import read_structured, read_text

PROMPT_LISTS = {
    "dreambooth_object": "25 prompts of DreamBooth's evaluation, for objects",
    "dreambooth_live": "25 prompts of DreamBooth's evaluation, for animals and people",
}
"""Lists that come with the package, by the names that ``--prompts`` takes."""

_LISTS_FOLDER = Path(__file__).parent / "prompt_lists"
_NAME = re.compile(r"[^\W_][\w-]{0,79}")
_PLACEHOLDERS = ("token", "class")
_SUBJECT = re.compile(r"\{token\} \{class\}|\{token\}|\{class\}")


@dataclass(frozen=True)
class PromptRow:
    """One prompt; what it does not say is said by the settings of the run."""

    prompt: str = setting("", "what to draw")
    negative_prompt: str | None = setting(None, "what to avoid")
    name: str | None = setting(None, "what its files are called instead of words of the prompt")
    seed: list[int] | None = setting(None, "seeds of the first pictures")
    num_images: int | None = setting(None, "pictures for each seed")
    num_inference_steps: list[int] | None = setting(None, "denoising steps")
    guidance_scale: list[float] | None = setting(None, "how strictly the prompt is followed")
    scheduler: list[str] | None = setting(None, "sampling methods")


@dataclass(frozen=True)
class SubjectWords:
    """What ``{token}`` and ``{class}`` in a prompt stand for."""

    token: str | None = None
    class_word: str | None = None


def read_prompts(source: str | Path) -> list[PromptRow]:
    """The prompts of a list.

    Args:
        source: a name of `PROMPT_LISTS`, or a file. Text has a prompt on each line; empty lines, and those that begin
            with ``#``, don't count. CSV has a header with ``prompt`` and other fields of `PromptRow`. JSON, JSON lines
            and YAML hold a list of prompts, or of mappings with these fields.

    Raises:
        UserError: no such file, a field that is unknown or of the wrong type, or no prompt at all.
    """
    file = Path(source)
    if str(source) in PROMPT_LISTS and not os.path.exists(file):
        file = _LISTS_FOLDER / f"{source}.txt"
    elif not os.path.exists(file) and (hint := nearest_hint(str(source)[:80], PROMPT_LISTS)):
        raise UserError(f"--prompts {source}: no such file or list{hint}")
    rows = [_row(values, f"--prompts {file}, {place}") for place, values in _items(file)]
    if not rows:
        raise UserError(f"--prompts {file} holds no prompt; write one on each line")
    return rows


def fill_in(prompt: str, words: SubjectWords) -> str:
    """The prompt with the subject's words for ``{token}`` and ``{class}``; a trigger may be all of its name.

    Raises:
        UserError: a word is missing.
    """

    def word(found: re.Match[str]) -> str:
        token, class_word = words.token, words.class_word
        if "{token}" in found[0] and not token:
            raise UserError(
                f"no adapter tells the trigger that {{token}} stands for in {_short(prompt)!r}; give it by --token"
            )
        if found[0] == "{class}" and not class_word:
            raise UserError(
                f"no adapter tells the word that {{class}} stands for in {_short(prompt)!r}; give it by --class_word"
            )
        parts = {"{token}": [token], "{class}": [class_word]}.get(found[0], [token, class_word])
        return " ".join(part for part in parts if part)

    return _SUBJECT.sub(word, prompt)


def unknown_placeholders(prompt: str) -> list[str]:
    """The words in braces that `fill_in` leaves as they are, though somebody may have meant otherwise."""
    return list(dict.fromkeys(word for word in re.findall(r"\{([A-Za-z_]+)\}", prompt) if word not in _PLACEHOLDERS))


def unknown_placeholder_note(word: str) -> str:
    """What is said of one of them."""
    meant = difflib.get_close_matches(word.lower(), _PLACEHOLDERS, n=1)
    hint = f", did you mean {{{meant[0]}}}?" if meant else ";"
    return f"in a prompt, {{{word}}} stays as it is{hint} {{token}} and {{class}} are what gets filled in"


def check_name(name: str) -> None:
    """Raises `UserError` for a name with which a file could lie outside the output folder, or nowhere."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"name {_short(name)!r}: a file's name has up to 80 letters, digits, - and _, the first a letter or digit"
        )


def _items(file: Path) -> Iterator[tuple[str, Any]]:
    """Each row with the place where it stands in the file."""
    suffix = file.suffix.lower()
    if suffix in (".json", ".jsonl", ".yaml", ".yml"):
        listed = read_structured(file, "--prompts")
        if not isinstance(listed, list):
            raise UserError(f"--prompts {file} must hold a list of prompts")
        yield from ((f"prompt {number}", values) for number, values in enumerate(listed, 1))
    elif suffix == ".csv":
        yield from _csv_rows(file)
    else:
        for number, line in enumerate(read_text(file, "--prompts").split("\n"), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                yield f"line {number}", line.strip()


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows by column; empty cells say nothing."""
    reader = csv.DictReader(io.StringIO(read_text(file, "--prompts"), newline=""), strict=True, skipinitialspace=True)
    try:
        if "prompt" not in (reader.fieldnames or ()):
            raise UserError(f"--prompts {file}: the first line must name the columns, one of them prompt")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"--prompts {file}, line {reader.line_num}: {len(reader.fieldnames or ())} columns are named, but "
                    "this row has another number; put text with commas in quotes"
                )
            if any(value.strip() for value in row.values()):
                yield f"line {reader.line_num}", {name: value for name, value in row.items() if value.strip()}
    except csv.Error as problem:
        raise UserError(f"--prompts {file}, after line {reader.line_num}: no CSV: {problem}") from None


def _row(values: object, place: str) -> PromptRow:
    if isinstance(values, str):
        values = {"prompt": values}
    if not isinstance(values, Mapping):
        raise UserError(f"{place}: expected a prompt, got a {type(values).__name__}")
    try:
        row = config_from_mapping(PromptRow, values)
        if row.name is not None:
            check_name(row.name)
    except UserError as problem:
        raise UserError(f"{place}: {problem}") from None
    if not row.prompt.strip():
        raise UserError(f"{place}: prompt is missing")
    return row


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
