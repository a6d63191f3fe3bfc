"""The adapters of a run, how they act by themselves, and named sets of them that are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.adapters.names import usable_adapter_name
from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.errors import UserError
from svft_diffusion.sampling.adapter_choice import (
    CheckedAdapter,
    adapter_label,
    check_adapter,
    parse_weighted_files,
    unique_names,
)
from svft_diffusion.sampling.adapter_use import AdapterUse
from svft_diffusion.sampling.prompt_files import SubjectWords
from svft_diffusion.sampling.regions import read_mask
from svft_diffusion.settings import nearest_hint

Uses = Mapping[str, AdapterUse]
"""Adapter -> how it acts."""


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter's file and how it acts where nothing else is said."""

    file: Path
    use: AdapterUse = field(default_factory=AdapterUse)
    name: str | None = None  # what sets and prompts call it; None: by its file


@dataclass(frozen=True)
class AdapterSets:
    """What ``--adapter`` and a matrix file say of adapters."""

    entries: Sequence[AdapterEntry] = ()
    sets: Mapping[str, Uses] = field(default_factory=dict)  # empty: one set, of all adapters


@dataclass(frozen=True)
class LoadedSets:
    """Adapters whose files were read and fit the base, and the sets of them by name; "" names the only one."""

    adapters: Mapping[str, CheckedAdapter]
    sets: Mapping[str, Uses]


def entries_of(texts: Sequence[str]) -> list[AdapterEntry]:
    """The entries of ``FILE[:weight]``.

    Raises:
        UserError: as `svft_diffusion.sampling.adapter_choice.parse_weighted_file`.
    """
    return [AdapterEntry(given.file, AdapterUse(given.weight)) for given in parse_weighted_files(texts)]


def check_sets(
    given: AdapterSets, base: str, *, variant: str | None = None, on_mismatch: OnMismatch = "error"
) -> LoadedSets:
    """Read the files of all adapters, and find those that the sets name.

    Raises:
        UserError: a file that is missing, damaged or of another base; an adapter that is there twice; a set that names
            an unknown one; a mask that can't be read.
    """
    names = unique_names(entry.name or adapter_label(entry.file) for entry in given.entries)
    for entry, name in zip(given.entries, names, strict=True):
        if entry.name is not None and usable_adapter_name(entry.name) != name:
            raise UserError(f"two adapters have the name {entry.name!r}")
    adapters = {
        name: check_adapter(entry.file, base, name=name, variant=variant, on_mismatch=on_mismatch)
        for name, entry in zip(names, given.entries, strict=True)
    }
    own = {name: entry.use for name, entry in zip(names, given.entries, strict=True)}
    sets = {
        label: {known_name(name, own, f"the adapter set {label!r}"): use for name, use in uses.items()}
        for label, uses in given.sets.items()
    }
    sets = sets or {"": own}
    for uses in sets.values():
        for use in uses.values():
            if use.region is not None and use.region.mask is not None:
                read_mask(use.region.mask)
    return LoadedSets(adapters, sets)


def known_name(name: str, known: Mapping[str, object], place: str) -> str:
    """The adapter that is called ``name``.

    Raises:
        UserError: there is none, with the nearest one.
    """
    usable = usable_adapter_name(name)
    if usable not in known:
        short = name if len(name) <= 80 else f"{name[:77]}..."
        hint = nearest_hint(usable[:80], known)
        there = f"{' There' if hint else '; there'} are {', '.join(known)}" if known else "; give its file by --adapter"
        raise UserError(f"{place} names an unknown adapter {short!r}{hint}{there}")
    return usable


def uses_in_prompt(
    uses: Uses, weights: Mapping[str, AdapterWeight], loaded: LoadedSets, prompt: str
) -> dict[str, AdapterUse]:
    """The adapters of a set, with the weights that tags in a prompt give them or add to them.

    Raises:
        UserError: a tag that names an unknown adapter.
    """
    found = dict(uses)
    short = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
    for name, weight in weights.items():
        name = known_name(name, loaded.adapters, f"the prompt {short!r}")
        found[name] = replace(found.get(name, AdapterUse()), weight=weight)
    return found


def scaled(use: AdapterUse, strength: float) -> AdapterUse:
    """The use with every weight multiplied by ``strength``."""
    return replace(use, weight=_scaled_weight(use.weight, strength))


def _scaled_weight(weight: AdapterWeight, strength: float) -> AdapterWeight:
    if isinstance(weight, Mapping):
        return {part: _scaled_weight(of_part, strength) for part, of_part in weight.items()}  # type: ignore[misc]
    return weight * strength + 0.0  # adding zero turns a negative zero into zero


def words_of(uses: Uses, loaded: LoadedSets, given: SubjectWords) -> SubjectWords:
    """The subject's words: those given, or of the first adapter that tells a trigger, if need be one out of the set."""
    if given.token is not None:
        return given
    names = [*uses, *(name for name in loaded.adapters if name not in uses)]
    headers = [loaded.adapters[name].header for name in names]
    header = next((header for header in headers if header.trigger), None) or next(iter(headers), None)
    if header is None:
        return given
    return SubjectWords(header.trigger, given.class_word or header.class_word)
