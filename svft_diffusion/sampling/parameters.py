"""The lines of text in which web interfaces for Stable Diffusion tell how a picture was made, written and read.

The format has no escapes for prompts: a line of one that begins with ``Negative prompt:`` reads as the negative prompt,
and spaces around a line are lost. Values in the last line are quoted as JSON where they need it. A picture's JSON, see
`svft_diffusion.sampling.png`, loses nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

_NEGATIVE = "Negative prompt:"
# The expression of the most used of these interfaces.
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_FEWEST_PAIRS = 3  # with less, the last line belongs to the prompt
_LONGEST_LINE = 10_000  # characters: the expression's time grows with their square
_MARKS = ',:\n"'

# Name in the text -> setting and its type.
_SETTINGS: dict[str, tuple[str, type]] = {
    "Steps": ("num_inference_steps", int),
    "Sampler": ("scheduler", str),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Model": ("base", str),
    "Version": ("version", str),
}


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The prompt, the negative prompt, and one line of ``Name: value`` pairs, as other tools write them."""
    lines = [str(settings["prompt"])]
    if settings.get("negative_prompt"):
        lines.append(f"{_NEGATIVE} {settings['negative_prompt']}")
    adapters = adapters_text(settings.get("adapters", ()))
    size = f"{settings['width']}x{settings['height']}" if "width" in settings and "height" in settings else None
    pairs = {
        "Steps": settings.get("num_inference_steps"),
        "Sampler": settings.get("scheduler_option", settings.get("scheduler")),
        "CFG scale": settings.get("guidance_scale"),
        "Seed": settings.get("seed"),
        "Size": size,
        "Model": settings.get("base"),
        "Adapters": adapters or None,
        "Version": settings.get("version"),
    }
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def parse_parameters(text: str) -> dict[str, Any]:
    """What a ``parameters`` chunk tells, of this product or another tool, under the names of our settings.

    ``prompt`` and ``negative_prompt`` are always there; a value that can't be read, and what has no name here, is not.
    """
    *lines, last = text.strip().split("\n")
    pairs = _PAIR.findall(last) if len(last) <= _LONGEST_LINE else []
    if len(pairs) < _FEWEST_PAIRS:
        lines, pairs = [*lines, last], []
    settings: dict[str, Any] = _prompts(lines)
    for name, written in pairs:
        value = _unquoted(written)
        if name in _SETTINGS:
            setting, kind = _SETTINGS[name]
            try:
                settings[setting] = kind(value)
            except ValueError:
                continue
        elif name == "Size" and (size := re.fullmatch(r"(\d{1,6})x(\d{1,6})", value)):
            settings["width"], settings["height"] = int(size[1]), int(size[2])
        elif name == "Adapters" and (adapters := _parse_adapters(value)):
            settings["adapters"] = adapters
    return settings


def _prompts(lines: list[str]) -> dict[str, str]:
    parts: dict[str, list[str]] = {"prompt": [], "negative_prompt": []}
    part = "prompt"
    for line in lines:
        line = line.strip()
        if line.startswith(_NEGATIVE):
            part, line = "negative_prompt", line[len(_NEGATIVE) :].strip()
        if line or parts[part]:  # an empty line at the beginning does not count
            parts[part].append(line)
    return {name: "\n".join(text) for name, text in parts.items()}


def _quoted(value: object) -> str:
    """Text with a character that separates pairs goes into JSON quotes; readers of this format undo exactly that."""
    text = str(value)
    needs_quotes = any(mark in text for mark in _MARKS) or text != text.strip() or not text
    return json.dumps(text, ensure_ascii=False) if needs_quotes else text


def _unquoted(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            pass
    return text


def adapters_text(adapters: Iterable[Mapping[str, Any]]) -> str:
    """``dog: 0.8, style: {"unet": 0.5}``: weights that are no numbers as JSON."""
    return ", ".join(_adapter_text(adapter) for adapter in adapters)


def _adapter_text(adapter: Mapping[str, Any]) -> str:
    weight = adapter["weight"]
    if isinstance(weight, float) and weight.is_integer():
        weight = int(weight)
    return f"{_quoted(adapter['name'])}: {json.dumps(weight)}"


def _parse_adapters(text: str) -> list[dict[str, Any]]:
    """The adapters of `adapters_text`, or none if the text is something else."""
    adapters: list[dict[str, Any]] = []
    decoder = json.JSONDecoder()
    place = 0
    try:
        while place < len(text):
            if text[place] == '"':
                name, place = decoder.raw_decode(text, place)
            else:
                end = text.index(": ", place)
                name, place = text[place:end], end
            if text[place : place + 2] != ": ":
                return []
            weight, place = decoder.raw_decode(text, place + 2)
            adapters.append({"name": name, "weight": weight})
            if place < len(text) and text[place : place + 2] != ", ":
                return []
            place += 2
    except (ValueError, RecursionError):
        return []
    return adapters
