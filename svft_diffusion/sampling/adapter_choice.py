"""Adapters as a person names them, ``FILE[:weight]``, checked before any model is loaded."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.adapters.names import usable_adapter_name
from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.errors import UserError
from svft_diffusion.files import AdapterHeader, Matches, check_base, layer_names, matches_of_folder, read_adapter
from svft_diffusion.files.carrier import file_of_adapter
from svft_diffusion.files.training_folder import ADAPTER_FILE, adapter_file
from svft_diffusion.models.loading import base_display_name, resolve_base
from svft_diffusion.sampling.weight_text import component_weights, number_in, weight_number
from svft_diffusion.terminal import printable


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


@dataclass(frozen=True)
class WeightedFile:
    """A file and the weight asked for it, of the whole adapter or of each component."""

    file: Path
    weight: AdapterWeight = 1.0


def parse_adapter_choice(text: str) -> AdapterChoice:
    """``FILE[:weight]``; a folder stands for the ``adapter.safetensors`` in it, no weight means 1.

    Raises:
        UserError: a weight that is no finite number, or two weights.
    """
    path, weight = _split_weight(text)
    if component_weights(text, weight) is not None:
        raise UserError(
            f"--adapter {text}: one weight for each adapter here; make one of it with `svft-diffusion blend {text} "
            "-o OUT.safetensors`, or use set_adapters in Python"
        )
    if _has_second_number(path, weight):
        raise UserError(
            f"--adapter {text}: one weight for each adapter; tools disagree on which of two is the text encoder's"
        )
    return AdapterChoice(_file_at(path), weight_number(f"--adapter {text}", weight, "FILE:0.8"))


def parse_weighted_file(text: str) -> WeightedFile:
    """``FILE[:weight]`` as `parse_adapter_choice`, where a weight may be ``unet=0.5,te=0.2`` too.

    Components that are not named are off; `svft_diffusion.sampling.weight_text.COMPONENT_LABELS` are their names.

    Raises:
        UserError: a weight that is no finite number, an unknown component, or two weights without names.
    """
    path, weight = _split_weight(text)
    if _has_second_number(path, weight):
        raise UserError(
            f"{text}: one weight for each adapter; tools disagree on which of two is the text encoder's, "
            "so write FILE:unet=0.5,te=0.2"
        )
    of_components = component_weights(text, weight)
    example = "FILE:0.8 or FILE:unet=0.5,te=0.2"
    return WeightedFile(_file_at(path), of_components or weight_number(text, weight, example))


def parse_weighted_files(texts: Sequence[str]) -> list[WeightedFile]:
    """`parse_weighted_file` of each, where one that is a number alone is a weight that lost its file."""
    files = [parse_weighted_file(text) for text in texts]
    for text, file in zip(texts, files, strict=True):
        if re.fullmatch(r"[-+]?[\d.]+", text) and not os.path.exists(file.file):
            raise UserError(f"{text} is no adapter file; a weight follows a colon, as in FILE:{text}")
    return files


def check_adapters(
    choices: Sequence[AdapterChoice], base: str, *, variant: str | None = None, on_mismatch: OnMismatch = "error"
) -> list[CheckedAdapter]:
    """Read every file and compare it with the base model ``base``, whose own weights are not loaded for that.

    A base on the Hub is compared when it is loaded, not here; and so is every base unless ``on_mismatch`` is ``error``.

    Raises:
        UserError: a file that is missing, damaged or no adapter, or was trained on another base.
    """
    names = unique_names(adapter_label(choice.file) for choice in choices)
    return [
        check_adapter(choice.file, base, name=name, weight=choice.weight, variant=variant, on_mismatch=on_mismatch)
        for choice, name in zip(choices, names, strict=True)
    ]


def refuse_twice(adapters: Iterable[CheckedAdapter]) -> None:
    """Raise `UserError` if one of the adapters is there twice, under whatever name: it would count twice."""
    files: dict[str, Path] = {}
    for adapter in adapters:
        if adapter.sha256 in files:
            raise UserError(
                f"{files[adapter.sha256]} and {adapter.file} are the same adapter; give it once, at the whole weight"
            )
        files[adapter.sha256] = adapter.file


def check_adapter(
    file: Path,
    base: str,
    *,
    name: str,
    weight: float = 1.0,
    variant: str | None = None,
    on_mismatch: OnMismatch = "error",
) -> CheckedAdapter:
    """One adapter of `check_adapters`, under the name ``name``."""
    header, tensors = read_adapter(file)
    folder = Path(resolve_base(base))
    if on_mismatch == "error" and folder.is_dir():
        names = layer_names(tensors)
        matches = matches_of_folder(folder, names, header.base.digests, variant)
        # None: the folder lacks a component that the adapter changes, so it is another model.
        check_base(header, matches or Matches(0, 0, len(names)), base_display_name(base), adapter=str(file))
    return CheckedAdapter(name, file, weight, sha256_of(file), header)


def sha256_of(file: Path) -> str:
    """Digest of an adapter's file; of a picture that carries one, that of the adapter, wherever it is carried.

    Raises:
        UserError: it can't be read any more.
    """
    return hashlib.sha256(file_of_adapter(file)).hexdigest()


def adapter_label(file: Path) -> str:
    """What a person would call the adapter: the file's name, or its folder's if the trainer named the file."""
    return file.absolute().parent.name if file.name == ADAPTER_FILE else file.stem


def file_label(file: Path) -> str:
    """A name that tells the file from others, without its folders; the trainer gives all of its files one name."""
    return adapter_label(file) if file.name == ADAPTER_FILE else file.name


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


def _split_weight(text: str) -> tuple[str, str]:
    """What stands before and after the last colon that belongs to no file name or Windows drive; "" for no weight."""
    head, _, tail = text.rpartition(":")
    if not head or os.path.exists(text) or re.fullmatch(r"[A-Za-z]", head):
        return text, ""
    is_weight = number_in(tail) is not None or "=" in tail or _ends_like_a_file(head)
    return (head, tail) if is_weight else (text, "")


def _has_second_number(path: str, weight: str) -> bool:
    """Whether two numbers were given, as ``FILE:0.5:0.2`` or ``FILE:0.5,0.2``."""
    head, _, tail = path.rpartition(":")
    numbers = weight.split(",")
    return (number_in(tail) is not None and _ends_like_a_file(head)) or (
        len(numbers) > 1 and all(number_in(number) is not None for number in numbers)
    )


def _file_at(path: str) -> Path:
    try:
        return adapter_file(Path(path).expanduser())
    except (OSError, RuntimeError, ValueError) as problem:  # a name that is too long, or of an unknown user's home
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"{printable(path, 200)} is no adapter file: {reason}") from None


def _ends_like_a_file(text: str) -> bool:
    return text.lower().endswith((".safetensors", ".png")) or (bool(text) and os.path.exists(text))
