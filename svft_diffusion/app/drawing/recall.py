"""The settings of a picture, brought back to the page: whatever of them the page can show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.app.components.adapter_cards import Card, with_card
from svft_diffusion.app.drawing.picture_request import PictureRequest, check_request
from svft_diffusion.app.shelf.library import Library, LibraryEntry
from svft_diffusion.app.shelf.uploads import check_pixels, read_upload, shown_name
from svft_diffusion.errors import UserError
from svft_diffusion.files.carrier import PNG_SIGNATURE, adapters_in_png
from svft_diffusion.models.loading import base_display_name
from svft_diffusion.sampling.plan import SETTINGS_OF_FEW
from svft_diffusion.sampling.png import told_settings
from svft_diffusion.sampling.schedulers import DEFAULT, scheduler_name

# Settings that a request has under the same name.
_FIELDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative_prompt": (str,),
    "seed": (int,),
    "num_inference_steps": (int,),
    "guidance_scale": (int, float),
    "width": (int,),
    "height": (int,),
}
_IN_WORDS = {"num_inference_steps": "number of steps", "guidance_scale": "guidance"}
_LONGEST_SHOWN = 60
_LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class Recalled:
    """What of a picture's settings the page can take over.

    Attributes:
        settings: everything that the picture tells, from whoever made it.
        values: fields of `PictureRequest` and what they become; those that the picture does not tell are not in it.
        base: one of the base models that are offered; None: the picture tells none, or another one.
        cards: None where the picture tells nothing of adapters.
        notes: what can't be as it was, for the visitor.
    """

    settings: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    cards: list[Card] | None = None
    notes: list[str] = field(default_factory=list)


def recall(data: bytes, label: str, library: Library, bases: Sequence[str], dtype: str) -> Recalled:
    """Read the settings of a picture.

    Args:
        data: the file; it may come from anybody.
        label: what messages call it.
        library: where its adapters are looked for, by the digests of their files.
        bases: those that the visitor may use.
        dtype: in which the app computes.

    Raises:
        UserError: no PNG picture, a damaged one, or one that tells nothing.
    """
    settings = told_settings(data, label)
    if not settings:
        raise UserError(f"{label} tells no settings; other tools and messengers remove them when they save a picture")
    recalled = Recalled(settings, base=_base(settings, bases))
    _recall_values(recalled)
    told = settings.get("base")
    if isinstance(told, str) and recalled.base is None:
        recalled.notes.append(f"it was drawn with the base model {_short(told)}, which is not offered here")
    if isinstance(settings.get("adapters"), list):
        carried = {adapter.sha256 for adapter in adapters_in_png(data, label)}
        recalled = dataclasses.replace(recalled, cards=_recall_adapters(recalled, library, carried))
    for name in SETTINGS_OF_FEW:
        if name != "scheduler_option" and name in settings:
            recalled.notes.append(f"it was drawn with {name} {_short(settings[name])}, which the page can't set")
    if settings.get("dtype", dtype) != dtype:
        recalled.notes.append(f"it was drawn in {_short(settings['dtype'])}, and the app computes in {dtype}")
    return recalled


def read_picture(file: Path, file_name: str, *, most_bytes: int, most_pixels: int) -> bytes:
    """An uploaded picture, if it is a PNG file of a size that the app takes.

    Raises:
        UserError: it is not.
    """
    data = read_upload(file, file_name, most_bytes)
    if not data.startswith(PNG_SIGNATURE):
        raise UserError(f"{shown_name(file_name)} is no PNG picture; only these keep their settings")
    check_pixels(data, shown_name(file_name), most_pixels)
    return data


def _base(settings: Mapping[str, Any], bases: Sequence[str]) -> str | None:
    return next((base for base in bases if base_display_name(base) == settings.get("base")), None)


def _recall_values(recalled: Recalled) -> None:
    usual = PictureRequest(base="", prompt="any")
    for name, kinds in _FIELDS.items():
        value = recalled.settings.get(name)
        if value is None:
            continue
        words = _IN_WORDS.get(name, name.replace("_", " "))
        if isinstance(value, bool) or not isinstance(value, kinds):
            recalled.notes.append(f"its {words} is {_short(value)}, which the page can't set")
            continue
        try:
            check_request(dataclasses.replace(usual, **cast(dict[str, Any], {name: value})))
        except UserError as problem:
            recalled.notes.append(str(problem))
        else:
            recalled.values[name] = value
    try:
        recalled.values["scheduler"] = scheduler_name(str(recalled.settings.get("scheduler_option", DEFAULT)))
    except UserError:
        told = _short(recalled.settings["scheduler_option"])
        recalled.notes.append(f"there is no scheduler {told} here: the base model's own is chosen")
        recalled.values["scheduler"] = DEFAULT


def _recall_adapters(recalled: Recalled, library: Library, carried: set[str]) -> list[Card]:
    cards: list[Card] = []
    for told in recalled.settings["adapters"]:
        if not isinstance(told, Mapping):
            continue
        name = _short(told.get("name"))
        entry = _entry(told, library)
        if entry is None:
            rescue = "; the picture carries it: upload it under Adapters" if str(told.get("sha256")) in carried else ""
            recalled.notes.append(f"the adapter {name} is not in the library{rescue}")
            continue
        weight = _weight(told.get("weight"))
        if weight is None:
            recalled.notes.append(f"{name} acted in a way that a card can't show; the command line can")
            continue
        try:
            cards = with_card(cards, entry, weight)
        except UserError as problem:
            recalled.notes.append(str(problem))
    return cards


def _entry(told: Mapping[str, Any], library: Library) -> LibraryEntry | None:
    """The adapter of the same content; of a picture that tells no digest, the one of the same name."""
    sha256, name = told.get("sha256"), told.get("name")
    try:
        if isinstance(sha256, str):
            entry = library.get(sha256[:16])
            return entry if entry.sha256 == sha256 else None
        return library.by_name(name) if isinstance(name, str) else None
    except UserError:
        return None


def _weight(told: object) -> AdapterWeight | None:
    """A weight that is one number, one for each component, or one for each block; None for anything else."""
    if _is_number(told):
        return told  # type: ignore[return-value]
    if not isinstance(told, Mapping):
        return None
    for part in told.values():
        blocks = part.values() if isinstance(part, Mapping) else [part]
        if not blocks or not all(_is_number(weight) for weight in blocks):
            return None
    return dict(told)


def _is_number(value: object) -> bool:
    # Compared, not converted: JSON holds whole numbers that no float can be.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_WEIGHT


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."
