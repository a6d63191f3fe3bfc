"""A matrix file: the settings of a run, adapters with how they act, and sets of them, in YAML or JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from svft_diffusion.errors import UserError
from svft_diffusion.models.loading import EMBEDDED_MODEL
from svft_diffusion.sampling.adapter_choice import parse_weighted_file
from svft_diffusion.sampling.adapter_sets import AdapterEntry, AdapterSets, entries_of
from svft_diffusion.sampling.adapter_use import AdapterUse, parse_use
from svft_diffusion.sampling.config import SamplingConfig
from svft_diffusion.sampling.prompt_files import PROMPT_LISTS
from svft_diffusion.settings import config_from_mapping, nearest_hint, settings_of
from svft_diffusion.structured_files import read_structured
from svft_diffusion.terminal import printable

_GROUPS = ("base model", "adapters", "pictures")  # the other settings say where and how, not what to draw
_OF_FILE = [item.name for item in settings_of(SamplingConfig) if item.group in _GROUPS] + ["dtype"]
_OF_COMMAND = [item.name for item in settings_of(SamplingConfig) if item.name not in _OF_FILE]
_SETS = "adapter_sets"
_MODELS = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path")
_LONGEST_PROBLEM = 400  # characters: what is wrong quotes the file
_ENTRY = ("file", "name", "weight", "schedule", "region")


def read_matrix(file: Path, given: Mapping[str, Any] | None = None) -> tuple[SamplingConfig, AdapterSets]:
    """The settings of a matrix file, and its adapters; paths in it start at the file.

    Its keys are the names of flags; what can be repeated is a list. ``adapter`` lists ``FILE[:weight]`` or mappings
    with ``file`` and, where needed, ``name``, ``weight``, ``schedule`` and ``region`` as
    `svft_diffusion.sampling.adapter_use.parse_use` takes them. ``adapter_sets`` maps names of sets, each an axis value
    of its own, to the adapters that act in it and how; an empty set is the base model.

    Args:
        given: settings that win over those of the file, as those of a command line do.

    Raises:
        UserError: it can't be read, an unknown key (with the nearest one), or a value of the wrong kind.
    """
    values = read_structured(file, "--matrix")
    if not isinstance(values, Mapping):
        raise UserError(f"--matrix {file} must hold settings, such as prompt and seed, each with a list of values")
    given = given or {}
    folder = file.parent
    try:
        for key in values:
            if key in _OF_COMMAND:
                raise UserError(f"{key} says nothing of what to draw; give --{key} to the command")
            if key not in (*_OF_FILE, _SETS):
                raise UserError(f"unknown key {key!r:.80}{nearest_hint(str(key)[:80], [*_OF_FILE, _SETS])}")
        settings = {key: _beside(folder, key, value) for key, value in values.items() if key not in ("adapter", _SETS)}
        entries = [] if "adapter" in given else [_entry(item, folder) for item in _list(values.get("adapter", []))]
        sets = _sets(values.get(_SETS) or {}, folder)
        config = config_from_mapping(SamplingConfig, settings)
    except UserError as problem:
        raise UserError(f"--matrix {file}: {printable(str(problem), _LONGEST_PROBLEM)}") from None
    if "adapter" in given:
        entries = entries_of(given["adapter"])
    return replace(config, **given), AdapterSets(entries, sets)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _beside(folder: Path, key: str, value: Any) -> Any:
    """A path as seen from the current folder; the base model and the list of prompts may also be names."""
    if not isinstance(value, str):
        return value
    if key == "base_config" or (key == "prompts" and value not in PROMPT_LISTS):
        return _in_folder(folder, value)
    if key in _MODELS and value != EMBEDDED_MODEL and os.path.exists(folder / value):
        return _in_folder(folder, value)
    return value


def _in_folder(folder: Path, path: str) -> str:
    """``path`` as seen from the current folder, without detours unless a link makes them the only way."""
    try:
        whole = folder / Path(path).expanduser()
        shortest = Path(os.path.normpath(whole))
        return str(shortest if shortest.resolve() == whole.resolve() else whole)
    except (OSError, RuntimeError, ValueError):  # no possible path, as whoever opens it will say
        return path


def _entry(item: object, folder: Path) -> AdapterEntry:
    if isinstance(item, str):
        given = parse_weighted_file(_in_folder(folder, item))
        return AdapterEntry(_existing(given.file), AdapterUse(given.weight))
    if not isinstance(item, Mapping):
        raise UserError(f"adapter: expected FILE:weight or a mapping with file, got {item!r}")
    for key in item:
        if key not in _ENTRY:
            raise UserError(f"adapter: unknown key {key!r}{nearest_hint(str(key), _ENTRY)}")
    name = item.get("name")
    if not isinstance(item.get("file"), str) or not isinstance(name, str | None):
        raise UserError("adapter: file (and name) must be text")
    use = {key: value for key, value in item.items() if key not in ("file", "name")}
    file = _existing(parse_weighted_file(_in_folder(folder, item["file"])).file)
    return AdapterEntry(file, _use(use or 1.0, folder), name)


def _existing(file: Path) -> Path:
    if not os.path.exists(file):
        raise UserError(
            f"there is no adapter {file}; paths start at the matrix file. `svft-diffusion demo` makes "
            "outputs/demo/adapter.safetensors, `svft-diffusion train` one of your photos"
        )
    return file


def _sets(value: object, folder: Path) -> dict[str, dict[str, AdapterUse]]:
    if not isinstance(value, Mapping):
        raise UserError(f"{_SETS} must map names to adapters and their weights")
    sets = {}
    for label, members in value.items():
        if not str(label).strip():
            raise UserError(f"{_SETS}: a set has no name")
        if not isinstance(members, Mapping | None):
            raise UserError(f"{_SETS}: {label} must map adapters to their weights; {{}} is the base model alone")
        sets[str(label)] = {str(name): _use(use, folder) for name, use in (members or {}).items()}
    return sets


def _use(value: object, folder: Path) -> AdapterUse:
    use = parse_use(value)
    if use.region is None or use.region.mask is None:
        return use
    return replace(use, region=replace(use.region, mask=Path(_in_folder(folder, str(use.region.mask)))))
