"""The subjects of an evaluation: their photos, words and prompts, and the adapters or pictures to score."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from svft_diffusion.data.photos import UnusablePhoto, open_photo, scan_photos
from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.config import KINDS, EvaluationConfig
from svft_diffusion.evaluation.tokens import without_token
from svft_diffusion.evaluation.toy_subjects import PROMPT_SCENES
from svft_diffusion.files import AdapterHeader
from svft_diffusion.models.loading import EMBEDDED_MODEL
from svft_diffusion.sampling.adapter_choice import AdapterChoice
from svft_diffusion.sampling.prompt_files import PROMPT_LISTS, PromptRow, SubjectWords, fill_in, read_prompts
from svft_diffusion.sampling.structured_files import read_structured
from svft_diffusion.settings import config_from_mapping, setting
from svft_diffusion.toybox.world import SCENES

TOY_LIST = "toy"
_LIST_OF_KIND = {kind: f"dreambooth_{kind}" for kind in KINDS}
_LIVE_CLASSES = ("dog", "cat")  # of DreamBooth's data set


@dataclass(frozen=True)
class Candidate:
    """An adapter to score; what of a run comes from its history."""

    choice: AdapterChoice
    label: str
    step: int | None = None


@dataclass(frozen=True)
class SubjectSource:
    """A subject as it was named: with adapters, or with a folder of pictures."""

    name: str
    candidates: list[Candidate]
    instance_data_dir: Path
    pictures: Path | None = None
    kind: str | None = None
    token: str | None = None
    class_word: str | None = None
    prompts: str | None = None


@dataclass(frozen=True)
class ListedSubject:
    """One subject of a ``--subjects`` list."""

    name: str | None = setting(None, "what it is called in the report")
    instance_data_dir: Path | None = setting(None, "folder of the real photos")
    adapter: str | None = setting(None, "FILE[:weight]")
    pictures: Path | None = setting(None, "folder of pictures that exist")
    kind: str | None = setting(None, "live or object", choices=KINDS)
    token: str | None = setting(None, "its rare word")
    class_word: str | None = setting(None, "what it is")
    prompts: str | None = setting(None, "a list of prompts, by name or file")


@dataclass(frozen=True)
class Photos:
    """The real photos of a subject."""

    names: list[str]
    digests: list[str]
    images: list[Image.Image]


@dataclass(frozen=True)
class SubjectPrompts:
    """The prompts of one subject, with the token and without."""

    source: str  # the list's name, or the file's
    with_token: list[str]
    without_token: list[str]


def read_subjects(file: Path) -> list[ListedSubject]:
    """The subjects of a list; paths in it are relative to it.

    Raises:
        UserError: no such file, malformed (with the line), an unknown key, or a subject without name, photos, or
            something to score; or two of one name.
    """
    listed = read_structured(file, "--subjects")
    if not isinstance(listed, list) or not listed:
        raise UserError(
            f"--subjects {file} must hold a list of subjects, each with name, instance_data_dir and adapter"
        )
    subjects = [_subject(item, f"--subjects {file}, subject {number}") for number, item in enumerate(listed, 1)]
    names = [str(subject.name).casefold() for subject in subjects]
    for number, name in enumerate(names, 1):
        if (first := names.index(name) + 1) != number:
            raise UserError(f"--subjects {file}: subjects {first} and {number} have the same name")
    return [_relative_to(file.parent, subject) for subject in subjects]


def read_photos(folder: Path) -> Photos:
    """The photos in a folder, in the order of their names.

    Raises:
        UserError: no such folder, or no usable photo in it.
    """
    paths = scan_photos(folder).photos
    try:
        images = [open_photo(path) for path in paths]
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    except (UnusablePhoto, OSError) as problem:
        raise UserError(f"a photo in {folder} can't be read any more: {problem}") from problem
    return Photos([path.name for path in paths], digests, images)


def words_of(source: SubjectSource, headers: Sequence[AdapterHeader]) -> SubjectWords:
    """The token and the class word: as given, else as the first adapter says that says it.

    The trigger of an adapter may be all of the subject's name, such as ``sks robot``: then the class word is no part of
    the token.
    """
    token, class_word = source.token, source.class_word
    for header in headers:
        token = header.trigger if token is None else token
        class_word = header.class_word if class_word is None else class_word
    if token and class_word and token.endswith(f" {class_word}"):
        token = token.removesuffix(class_word).rstrip()
    return SubjectWords(token, class_word)


def prompts_of(source: SubjectSource, words: SubjectWords, config: EvaluationConfig, *, base: str) -> SubjectPrompts:
    """The prompts by which a subject is scored.

    Raises:
        UserError: no such list, or a word of the subject is missing.
    """
    name = source.prompts or config.prompts or default_list(source.kind, words.class_word, base)
    listed = (_toy_prompts() if name == TOY_LIST else _read_list(name))[: config.num_prompts]
    if not words.class_word and any("{class}" in prompt for prompt in listed):
        raise UserError(f"no adapter of {source.name} tells what it is; give its class word with --class_word")
    with_token = [fill_in(prompt, words) for prompt in listed]
    plain = [without_token(prompt, words.token or "") for prompt in with_token]
    return SubjectPrompts(name if name in (TOY_LIST, *PROMPT_LISTS) else Path(name).name, with_token, plain)


def default_list(kind: str | None, class_word: str | None, base: str) -> str:
    """The list of prompts for a subject of which none was named."""
    if base == EMBEDDED_MODEL:
        return TOY_LIST
    return _LIST_OF_KIND[kind or ("live" if (class_word or "").casefold() in _LIVE_CLASSES else "object")]


def kind_of(source: SubjectSource, prompts_source: str | None) -> str | None:
    """Live or object: as given, else by the list of prompts; None where nothing says it."""
    return source.kind or {name: kind for kind, name in _LIST_OF_KIND.items()}.get(prompts_source or "")


def _toy_prompts() -> list[str]:
    """Scenes of the embedded model's world in which the photos of its subjects don't show them."""
    return [f"a photo of {{token}} {{class}} {SCENES[scene][0]}" for scene in PROMPT_SCENES]


def _read_list(name: str) -> list[str]:
    """The prompts of a list. Raises `UserError` where one brings settings: all pictures are drawn alike here."""
    rows = read_prompts(name)
    for number, row in enumerate(rows, 1):
        if row != PromptRow(prompt=row.prompt, name=row.name):
            raise UserError(f"--prompts {name}, prompt {number}: an evaluation takes the prompt alone, no settings")
    return [row.prompt for row in rows]


def _subject(item: object, place: str) -> ListedSubject:
    if not isinstance(item, Mapping):
        raise UserError(f"{place}: expected name, instance_data_dir and adapter, got a {type(item).__name__}")
    try:
        subject = config_from_mapping(ListedSubject, item)
    except UserError as problem:
        raise UserError(f"{place}: {problem}") from None
    for needed in ("name", "instance_data_dir"):
        if not str(getattr(subject, needed) or "").strip():
            raise UserError(f"{place}: {needed} is missing")
    if (subject.adapter is None) == (subject.pictures is None):
        raise UserError(f"{place} ({subject.name}): give either adapter or pictures")
    return subject


def _relative_to(folder: Path, subject: ListedSubject) -> ListedSubject:
    values: dict[str, Any] = dict(vars(subject))
    for name in ("instance_data_dir", "pictures"):
        if values[name] is not None:
            values[name] = folder / values[name].expanduser()
    # Only a list of its own is a path; and an adapter may have a weight at its end, which stays there.
    if subject.prompts is not None and subject.prompts not in (TOY_LIST, *PROMPT_LISTS):
        values["prompts"] = str(folder / Path(subject.prompts).expanduser())
    if subject.adapter is not None:
        values["adapter"] = str(folder / Path(subject.adapter).expanduser())
    return ListedSubject(**values)
