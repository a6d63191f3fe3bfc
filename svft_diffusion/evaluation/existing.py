"""Pictures that exist, whoever made them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svft_diffusion.data.photos import UnusablePhoto, open_photo, scan_photos, upright_size
from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.scoring import PromptedPictures
from svft_diffusion.evaluation.tokens import without_token
from svft_diffusion.sampling.png import read_png_settings


@dataclass(frozen=True)
class ExistingPictures:
    """Pictures in a folder, with what they were asked for, without the token.

    Attributes:
        label: the folder's name.
        prompts: None for pictures of which nobody knows.
        base: the base model that the first one of them names that names one.
        skipped: pictures that can't be used, with reasons.
    """

    label: str
    files: list[Path]
    prompts: list[str | None]
    base: str | None
    skipped: list[str]

    def check_sizes(self) -> None:
        """Refuse pictures of one prompt that are of different sizes, which LPIPS can't compare.

        Raises:
            UserError: names two of them.
        """
        firsts: dict[str, Path] = {}
        for file, prompt in zip(self.files, self.prompts, strict=True):
            if prompt is not None:
                first = firsts.setdefault(prompt, file)
                if upright_size(file) != upright_size(first):
                    raise UserError(f"--lpips: {first} and {file} have one prompt, but are of different sizes")

    def pictures(self) -> PromptedPictures:
        """All of them.

        Raises:
            UserError: one can't be read any more.
        """
        try:
            return PromptedPictures([open_photo(file) for file in self.files], self.prompts)
        except (UnusablePhoto, OSError) as problem:
            raise UserError(f"a picture of {self.label} can't be read any more: {problem}") from problem


def find_pictures(folder: Path, token: str) -> ExistingPictures:
    """The pictures directly in a folder, by name; grids and other sheets of this program are left out.

    A picture's prompt stands in its settings, as the sampler writes them, or in a text file beside it.

    Raises:
        UserError: no such folder, or no picture in it.
    """
    found = scan_photos(folder)
    files, prompts, base = [], [], None
    for file in found.photos:
        settings = _settings(file)
        if settings is not None and "prompt" not in settings:
            continue
        files.append(file)
        prompt = _prompt(file, settings)
        prompts.append(None if prompt is None else without_token(prompt, token))
        if base is None and settings is not None and "base" in settings:
            base = str(settings["base"])
    if not files:
        raise UserError(f"no picture in {folder}, only sheets of pictures")
    skipped = [f"{one.path.name} ({one.reason})" for one in found.unusable_pictures]
    return ExistingPictures(folder.resolve().name, files, prompts, base, skipped)


def _settings(path: Path) -> dict[str, Any] | None:
    try:
        return read_png_settings(path)
    except UserError:
        return None


def _prompt(path: Path, settings: dict[str, Any] | None) -> str | None:
    if settings is not None:
        return str(settings["prompt"])
    text = path.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8-sig").strip() or None if text.is_file() else None
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"{text} can't be read as the prompt of {path.name}: {problem}") from problem
