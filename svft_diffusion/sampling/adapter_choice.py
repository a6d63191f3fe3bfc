"""Adapters as a person names them, ``FILE[:weight]``, checked before any model is loaded."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from svft_diffusion.adapters.names import usable_adapter_name
from svft_diffusion.errors import UserError
from svft_diffusion.files import AdapterHeader, check_base, fingerprint_of_folder, layer_names, read_adapter
from svft_diffusion.models.loading import base_display_name, resolve_base

ADAPTER_FILE = "adapter.safetensors"  # the name that the trainer gives to every adapter


@dataclass(frozen=True)
class AdapterChoice:
    """A file and the weight asked for it."""

    file: Path
    weight: float = 1.0


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter file that was read and fits the base model."""

    name: str  # unique among the adapters of one run, and one that adapters can have
    file: Path
    weight: float
    sha256: str
    header: AdapterHeader


def parse_adapter_choice(text: str) -> AdapterChoice:
    """``FILE[:weight]``; a folder stands for the ``adapter.safetensors`` in it, no weight means 1.

    Raises:
        UserError: a weight that is no finite number, or two weights.
    """
    path, weight = text, 1.0
    head, _, tail = text.rpartition(":")
    # A colon may belong to the file's name, and after a Windows drive it always does.
    if head and not Path(text).exists() and not re.fullmatch(r"[A-Za-z]", head):
        number = _number(tail)
        if number is not None:
            path, weight = head, number
        elif _ends_like_a_file(head):
            raise UserError(f"--adapter {text}: the weight {tail!r} is not a number; write FILE:0.8")
    if _number(path.rpartition(":")[2]) is not None and _ends_like_a_file(path.rpartition(":")[0]):
        raise UserError(
            f"--adapter {text}: one weight for each adapter; tools disagree on which of two is the text encoder's"
        )
    if not math.isfinite(weight):
        raise UserError(f"--adapter {text}: the weight must be a finite number")
    file = Path(path).expanduser()
    return AdapterChoice(file / ADAPTER_FILE if file.is_dir() else file, weight)


def check_adapters(choices: Sequence[AdapterChoice], base: str, *, variant: str | None = None) -> list[CheckedAdapter]:
    """Read every file and compare it with the base model ``base``, whose own weights are not loaded for that.

    A base on the Hub is compared when it is loaded, not here.

    Raises:
        UserError: a file that is missing, damaged or no adapter, or was trained on another base.
    """
    names = unique_names(adapter_label(choice.file) for choice in choices)
    return [
        check_adapter(choice.file, base, name=name, weight=choice.weight, variant=variant)
        for choice, name in zip(choices, names, strict=True)
    ]


def check_adapter(
    file: Path, base: str, *, name: str, weight: float = 1.0, variant: str | None = None
) -> CheckedAdapter:
    """One adapter of `check_adapters`, under the name ``name``."""
    header, tensors = read_adapter(file)
    folder = Path(resolve_base(base))
    if folder.is_dir():
        fingerprint = fingerprint_of_folder(folder, layer_names(tensors), variant)
        # No fingerprint: the folder lacks layers that the adapter changes, so it is another model.
        check_base(header, fingerprint or "", base_display_name(base), adapter=file.name)
    return CheckedAdapter(name, file, weight, sha256_of(file), header)


def sha256_of(file: Path) -> str:
    """Digest of a file's content.

    Raises:
        UserError: it can't be read any more.
    """
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as problem:
        raise UserError(f"can't read {file}: {problem.strerror or problem}") from problem


def adapter_label(file: Path) -> str:
    """What a person would call the adapter: the file's name, or its folder's if the trainer named the file."""
    return file.absolute().parent.name if file.name == ADAPTER_FILE else file.stem


def unique_names(labels: Iterable[str]) -> list[str]:
    """``labels`` as names that adapters can have, numbered where two would be the same."""
    names: list[str] = []
    for label in labels:
        plain = usable_adapter_name(label)
        name, number = plain, 2
        while name in names:
            name, number = f"{plain}-{number}", number + 1
        names.append(name)
    return names


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _ends_like_a_file(text: str) -> bool:
    return text.lower().endswith(".safetensors") or (bool(text) and Path(text).exists())
