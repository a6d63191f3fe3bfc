"""PNG files that know how they were made.

Two text chunks: ``parameters``, the lines that web interfaces for Stable Diffusion write and read, and
``svft_diffusion``, the same settings as JSON, from which nothing is lost. After the pixels, where they delay no viewer,
come the adapters that the picture carries, see `svft_diffusion.files.carrier`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from svft_diffusion.errors import UserError
from svft_diffusion.files.carrier import ADAPTER_CHUNK, SETTINGS_KEYWORD, settings_in_png
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.sampling.parameters import parameters_text, parse_parameters

PARAMETERS_CHUNK = "parameters"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


def save_png(image: Image.Image, path: str | Path, settings: Mapping[str, Any], adapters: Sequence[bytes] = ()) -> Path:
    """Write ``image`` with its ``settings`` inside, whole or not at all; equal input gives equal bytes.

    ``settings`` holds what JSON can hold. Those with a ``prompt`` get the ``parameters`` chunk too. ``adapters`` are
    files of adapters that the picture shall carry.

    Raises:
        UserError: the file can't be written.
    """
    path = Path(path)
    chunks = PngInfo()
    if "prompt" in settings:
        # A lone surrogate, which no text chunk can hold, becomes a question mark here and survives in the JSON.
        chunks.add_text(PARAMETERS_CHUNK, parameters_text(settings).encode("utf-8", "replace").decode("utf-8"))
    chunks.add_text(SETTINGS_KEYWORD, json.dumps(dict(settings), sort_keys=True, ensure_ascii=True, allow_nan=False))
    for adapter in adapters:
        chunks.add(ADAPTER_CHUNK, adapter, after_idat=True)
    with replace_when_whole(path) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=chunks)
    return path


def read_png_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` put into a file; its pixels are decoded too, so a damaged file is noticed.

    Raises:
        UserError: no such file, a damaged file, or a picture without settings of this product.
    """
    return read_png(path)[1]


def read_png(path: str | Path) -> tuple[Image.Image, dict[str, Any]]:
    """A picture of `save_png`, decoded, and its settings.

    Raises:
        UserError: as `read_png_settings`.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            assert isinstance(image, PngImageFile)
            image.load()
            picture = image.copy()
            text = image.text.get(SETTINGS_KEYWORD)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise UserError(f"{path} can't be read as a PNG picture: {problem}") from problem
    if text is None:
        raise UserError(f"{path} holds no settings of svft_diffusion")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path} holds damaged settings: {problem}") from problem
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds damaged settings: not an object")
    return picture, settings


def told_settings(data: bytes, label: str) -> dict[str, Any]:
    """The settings that a picture tells: those of `save_png` or, of another tool, what its ``parameters`` chunk tells.

    Args:
        data: the whole PNG file; its pixels are not decoded.
        label: what messages call it.

    Returns:
        Empty where it tells none. What another tool calls its sampler is ``scheduler_option``, in that tool's words.

    Raises:
        UserError: no PNG picture, or a damaged one.
    """
    if settings := settings_in_png(data, label):
        return settings
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            text = image.info.get(PARAMETERS_CHUNK)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise UserError(f"{label} can't be read as a PNG picture: {problem}") from problem
    if not isinstance(text, str):
        return {}
    settings = parse_parameters(text)
    if "scheduler" in settings:
        settings["scheduler_option"] = settings.pop("scheduler")
    return settings


def is_damaged_png(path: Path) -> bool:
    """Whether a file is a PNG picture without its end, as a power cut leaves it, or can't be decoded; so is an empty
    file. What is no PNG at all is not damaged, but something else.

    Raises:
        UserError: it can't be read.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(len(_SIGNATURE))
            file.seek(max(0, file.seek(0, os.SEEK_END) - len(_END)))
            end = file.read()
    except OSError as problem:
        raise UserError(f"{path} can't be read: {problem.strerror or problem}") from problem
    if beginning != _SIGNATURE:
        return not beginning
    if end != _END:
        return True
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return True
    except Image.DecompressionBombError:
        return False
    return False
