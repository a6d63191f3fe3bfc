"""Pictures on disk: all that the app has made, and what each tells of its making."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svft_diffusion.sampling.parameters import adapters_text
from svft_diffusion.sampling.schedulers import DEFAULT

PICTURES_PER_PAGE = 24

Details = list[tuple[str, str]]
"""Names and values in the order in which they are shown."""


@dataclass(frozen=True)
class HistoryPage:
    """Some of the pictures, the newest first.

    Attributes:
        number: of the page, from 1.
        pages: how many there are, at least 1.
    """

    files: list[Path]
    number: int
    pages: int


def history_page(folder: Path, number: int) -> HistoryPage:
    """A page of the pictures in a folder; the nearest one to ``number`` that there is."""
    found = []
    if folder.is_dir():
        for file in folder.glob("*.png"):
            try:
                facts = file.lstat()
                if stat.S_ISREG(facts.st_mode) and facts.st_size:  # an empty one is being written
                    found.append((facts.st_mtime_ns, file.name, file))
            except OSError:  # it is gone by now
                continue
    files = [file for _, _, file in sorted(found, reverse=True)]
    pages = max(1, -(-len(files) // PICTURES_PER_PAGE))
    number = min(max(number, 1), pages)
    return HistoryPage(files[(number - 1) * PICTURES_PER_PAGE : number * PICTURES_PER_PAGE], number, pages)


def details_of(settings: Mapping[str, Any]) -> Details:
    """What a picture's settings say to people. They may come from anywhere: show them as text only."""
    size = f"{settings['width']} x {settings['height']}" if {"width", "height"} <= settings.keys() else ""
    scheduler = settings.get("scheduler_option") or DEFAULT
    own_scheduler = settings.get("scheduler")
    if scheduler == DEFAULT and own_scheduler:
        scheduler = f"{own_scheduler} (the base model's own)"
    values = {
        "Prompt": settings.get("prompt"),
        "Not read": settings.get("prompt_not_read"),  # by the base model: the end of a prompt that is too long for it
        "Negative prompt": settings.get("negative_prompt"),
        "Adapters": _adapters(settings.get("adapters")) or "none",
        "Seed": settings.get("seed"),
        "Steps": settings.get("num_inference_steps"),
        "Guidance": settings.get("guidance_scale"),
        "Size": size,
        "Scheduler": scheduler,
        "Base model": settings.get("base"),
        "Safety checker": "blacked the picture out" if settings.get("blacked_out") is True else None,
        "Made with": settings.get("version"),
    }
    return [(name, str(value)) for name, value in values.items() if value not in (None, "")]


def _adapters(adapters: object) -> str:
    if not isinstance(adapters, list):
        return ""
    return adapters_text(
        {"name": one.get("name"), "weight": one.get("weight")} for one in adapters if isinstance(one, Mapping)
    )
