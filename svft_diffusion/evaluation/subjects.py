"""The subjects of an evaluation: their photos, words and prompts, and the adapters or pictures to score."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
from svft_diffusion.settings import setting
from svft_diffusion.structured_files import read_rows
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
    """The real photos of a subject.

    Attributes:
        files: in the order of their names.
        digests: SHA-256 of each.
        skipped: pictures beside them that can't be used, with reasons.
    """

    files: list[Path]
    digests: list[str]
    skipped: list[str]

    def images(self) -> list[Image.Image]:
        """The photos themselves, which are too large to be kept for all subjects.

        Raises:
            UserError: one can't be read any more.
        """
        try:
            return [open_photo(file) for file in self.files]
        except (UnusablePhoto, OSError) as problem:
            raise UserError(f"a photo in {self.files[0].parent} can't be read any more: {problem}") from problem


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
    subjects = read_rows(file, "--subjects", "subject", ListedSubject, needed=("name", "instance_data_dir"))
    for number, subject in enumerate(subjects, 1):
        if (subject.adapter is None) == (subject.pictures is None):
            raise UserError(f"--subjects {file}, subject {number} ({subject.name}): give either adapter or pictures")
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
    found = scan_photos(folder)
    try:
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in found.photos]
    except OSError as problem:
        raise UserError(f"a photo in {folder} can't be read any more: {problem}") from problem
    return Photos(found.photos, digests, [f"{one.path.name} ({one.reason})" for one in found.unusable_pictures])


def words_of(source: SubjectSource, headers: Sequence[AdapterHeader]) -> SubjectWords:
    """The token and the class word: as given, else as the adapters say.

    The trigger of an adapter may be all of the subject's name, such as ``sks robot``: then the class word is no part of
    the token.

    Raises:
        UserError: the adapters say different ones, so that no prompt would suit all of them.
    """
    class_words = [source.class_word] if source.class_word is not None else [header.class_word for header in headers]
    class_word = _the_one(class_words, "--class_word", source.name)
    tokens = [source.token] if source.token is not None else [header.trigger for header in headers]
    if class_word:
        tokens = [(token or "").removesuffix(f" {class_word}").rstrip() for token in tokens]
    return SubjectWords(_the_one(tokens, "--token", source.name), class_word)


def _the_one(words: Sequence[str | None], flag: str, name: str) -> str | None:
    """The word that all say that say one."""
    known = list(dict.fromkeys(word for word in words if word))
    if len(known) > 1:
        raise UserError(
            f"the adapters of {name} say {' and '.join(map(repr, known))}: if they are of one subject, give {flag}; "
            "else list them with --subjects"
        )
    return known[0] if known else None


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
