"""The list of `train-many`: a name for each subject, and the settings in which it differs from the others."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svft_diffusion.errors import UserError
from svft_diffusion.settings import config_from_mapping, nearest_hint, settings_of
from svft_diffusion.structured_files import read_structured
from svft_diffusion.training.config import TrainingConfig

PLACEHOLDER = "{name}"
"""Stands for a row's name in the shared settings of `_WITH_PLACEHOLDER`."""

_WITH_PLACEHOLDER = (
    "instance_data_dir", "instance_prompt", "class_data_dir", "class_prompt", "class_prompts_file", "concepts_list",
    "validation_prompt", "hub_model_id",
)  # fmt: skip
_SETTINGS = {item.name: item for item in settings_of(TrainingConfig)}
_ONE_BASE = "all rows share one base model and its precision; give --{name} to the whole command"
_ONE_CACHE = "all rows share one cache; give --{name} to the whole command"
_OWN_TO_COMMAND = {
    **{name: _ONE_BASE for name, item in _SETTINGS.items() if item.group == "base model"},
    **dict.fromkeys(("mixed_precision", "allow_tf32", "base_quantization"), _ONE_BASE),
    **dict.fromkeys(("factor_cache", "factor_cache_size"), _ONE_CACHE),
    "output_dir": "a row is written into the folder of its name; leave out {name}",
    "resume_from_checkpoint": "rows go on from their checkpoints by themselves; leave out {name}",
    "dry_run": "give --{name} to the whole command",
}
_IMPOSSIBLE = re.compile(r'[<>:"/\\|?*]')
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_LONGEST_NAME = 100
OWN_NAMES = ("report.json", "report.md", "report.png", "status.json", "stop")
"""Files of the command in the output folder."""


@dataclass(frozen=True)
class Row:
    """One subject: its adapter is trained into ``config.output_dir``, a folder of its name."""

    number: int  # from 1, as in the list
    name: str
    config: TrainingConfig

    def __str__(self) -> str:
        return f"row {self.number} ({self.name})"


@dataclass(frozen=True)
class Listing:
    """The rows that can be, and a line for each problem of the others."""

    rows: list[Row]
    problems: list[str]


def read_list(source: Path, shared: Mapping[str, Any], output_dir: Path) -> Listing:
    """The rows of a list, each with the shared settings and its own, which win.

    Args:
        source: YAML, JSON or JSON lines (``.jsonl``): a list of mappings. Or a folder: every folder in it is a row with
            its name and photos.
        shared: settings by name; ``{name}`` in prompts, folders and files among them is the row's name. Paths in a row
            are relative to the list.

    Raises:
        UserError: ``source`` is no list at all.
    """
    if shared.get("resume_from_checkpoint") is not None:
        raise UserError("train-many goes on by itself; leave out --resume_from_checkpoint")
    unknown = [name for name in shared if name not in _SETTINGS]
    if unknown:
        raise UserError(f"unknown setting {unknown[0]!r}{nearest_hint(str(unknown[0]), _SETTINGS)}")
    folder = source if source.is_dir() else source.parent
    rows: list[Row] = []
    problems: list[str] = []
    named: dict[str, int] = {}
    for number, item in enumerate(_items(source, output_dir), 1):
        name = item.get("name") if isinstance(item, dict) else None
        place = f"row {number} ({name})" if isinstance(name, str) else f"row {number}"
        try:
            row = _row(number, item, shared, folder, output_dir)
            key = unicodedata.normalize("NFC", row.name).casefold()
            if (other := named.setdefault(key, number)) != number:
                raise UserError(f"row {other} has this name too, and some systems don't tell the case of letters")
            rows.append(row)
        except UserError as problem:
            problems.append(f"{place}: {problem}")
    return Listing(rows, problems)


def _items(source: Path, output_dir: Path) -> list[Any]:
    if source.is_dir():
        return _folders(source, output_dir)
    listed = read_structured(source, "the list")
    if not isinstance(listed, list) or not listed:
        raise UserError(f"the list {source} must hold a list of subjects, each with a name and settings of its own")
    return listed


def _folders(source: Path, output_dir: Path) -> list[dict[str, Any]]:
    if output_dir.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--output_dir {output_dir} lies among the folders of photos; write to another place")
    names = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise UserError(f"{source} holds no folders; each subject needs one with its photos")
    return [{"name": name, "instance_data_dir": name} for name in names]


def _row(number: int, item: object, shared: Mapping[str, Any], folder: Path, output_dir: Path) -> Row:
    if not isinstance(item, dict):
        raise UserError(f"expected a name and settings, got a {type(item).__name__}")
    if "name" not in item:
        raise UserError("name is missing; it is the folder that the adapter is written into")
    name = item["name"]
    _check_name(name)
    own = {setting: value for setting, value in item.items() if setting != "name"}
    for setting in own:
        if setting not in _SETTINGS:
            raise UserError(f"unknown setting {setting!r}{nearest_hint(str(setting), ['name', *_SETTINGS])}")
        if setting in _OWN_TO_COMMAND:
            raise UserError(_OWN_TO_COMMAND[setting].format(name=setting))
    if shared.get("hub_model_id") and "hub_model_id" not in own and PLACEHOLDER not in str(shared["hub_model_id"]):
        raise UserError("--hub_model_id is one place for all adapters; write {name} in it, or give each row its own")
    common = {
        setting: str(value).replace(PLACEHOLDER, name)
        if setting in _WITH_PLACEHOLDER and isinstance(value, str | Path)
        else value
        for setting, value in shared.items()
    }
    config = config_from_mapping(
        TrainingConfig, common | {setting: _beside(folder, setting, value) for setting, value in own.items()}
    )
    return Row(number, name, replace(config, output_dir=output_dir / name))


def _beside(folder: Path, setting: str, value: Any) -> Any:
    """Paths of a row start at the list; but for the folder of curves, which lies in the row's own."""
    is_path = _SETTINGS[setting].kind is Path and setting != "logging_dir"
    return folder / value if is_path and isinstance(value, str) else value


def _check_name(name: object) -> None:
    """A name must be that of a folder inside the output folder, on every system."""
    if not isinstance(name, str):
        raise UserError(f"name: expected text, got {name!r}; write it in quotes")
    if not name.strip():
        raise UserError("name is empty; it is the folder that the adapter is written into")
    if name.startswith(".") or name != name.strip() or name.endswith("."):
        raise UserError(f"name {name!r} can't be a folder everywhere: no dot or space at the start or the end")
    if (found := _IMPOSSIBLE.search(name)) or not name.isprintable():
        mark = found.group() if found else "control characters"
        raise UserError(f"name {name!r} can't be a folder inside --output_dir: leave out {mark}")
    if _RESERVED.fullmatch(name):
        raise UserError(f"name {name!r} is that of a device on Windows; choose another")
    if name.casefold() in OWN_NAMES:
        raise UserError(f"name {name!r} is that of a file that train-many writes; choose another")
    if len(name.encode()) > _LONGEST_NAME:
        raise UserError(f"name {name!r} is longer than {_LONGEST_NAME} bytes")
