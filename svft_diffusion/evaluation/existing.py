"""Pictures that exist, whoever made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from svft_diffusion.data.photos import open_photo, scan_photos
from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.scoring import PromptedPictures
from svft_diffusion.evaluation.tokens import without_token
from svft_diffusion.sampling.png import read_png_settings


def read_pictures(folder: Path, token: str) -> PromptedPictures:
    """The pictures directly in a folder, by name; grids and other sheets of this program are left out.

    A picture's prompt stands in its settings, as the sampler writes them, or in a text file beside it.

    Raises:
        UserError: no such folder, or no picture in it.
    """
    pictures, prompts = [], []
    for path in scan_photos(folder).photos:
        settings = _settings(path)
        if settings is not None and "prompt" not in settings:
            continue
        pictures.append(open_photo(path))
        prompt = _prompt(path, settings)
        prompts.append(None if prompt is None else without_token(prompt, token))
    if not pictures:
        raise UserError(f"no picture in {folder}, only sheets of pictures")
    return PromptedPictures(pictures, prompts)


def base_named_in(folder: Path) -> str | None:
    """The base model that the first picture with settings names, if one does."""
    found = (settings for path in scan_photos(folder).photos if (settings := _settings(path)) is not None)
    return next((str(settings["base"]) for settings in found if "base" in settings), None)


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
