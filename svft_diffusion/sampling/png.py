"""PNG files that know how they were made.

Two text chunks: ``parameters``, the lines that web interfaces for Stable Diffusion write and read, and
``svft_diffusion``, the same settings as JSON, from which nothing is lost. After the pixels, where they delay no viewer,
come the adapters that the picture carries, see `svft_diffusion.files.carrier`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from svft_diffusion.errors import UserError
from svft_diffusion.files.carrier import ADAPTER_CHUNK, SETTINGS_KEYWORD
from svft_diffusion.files.whole_files import replace_when_whole

PARAMETERS_CHUNK = "parameters"


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
    path = Path(path)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            assert isinstance(image, PngImageFile)
            image.load()
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
    return settings


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The prompt, the negative prompt, and one line of ``Name: value`` pairs, as other tools write them."""
    lines = [str(settings["prompt"])]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    adapters = ", ".join(f"{adapter['name']}: {adapter['weight']:g}" for adapter in settings.get("adapters", ()))
    size = f"{settings['width']}x{settings['height']}" if "width" in settings and "height" in settings else None
    pairs = {
        "Steps": settings.get("num_inference_steps"),
        "Sampler": settings.get("scheduler"),
        "CFG scale": settings.get("guidance_scale"),
        "Seed": settings.get("seed"),
        "Size": size,
        "Model": settings.get("base"),
        "Adapters": adapters or None,
        "Version": settings.get("version"),
    }
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    """Text with a character that separates pairs goes into JSON quotes; readers of this format undo exactly that."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text
