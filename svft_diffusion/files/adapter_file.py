"""Adapter file, format version 0: one safetensors file for a whole pipeline.

Tensors: ``<canonical layer name>.values``, float32, one dimension; which entry of the layer's core matrix each value
is follows from method, pattern and rank in the header. Singular factors are not stored: they are recomputed from the
base model, whose fingerprint the header holds.

Header: the safetensors metadata has the single key ``svft_diffusion``, with JSON in sorted order (the library writes
several metadata keys in random order; with one, the same training gives the same bytes). No time, no folder of the
machine that wrote it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from svft_diffusion.errors import UserError
from svft_diffusion.files.names import split_canonical_name
from svft_diffusion.files.whole_files import replace_when_whole

FORMAT_VERSION = 0
METADATA_KEY = "svft_diffusion"
VALUES_SUFFIX = ".values"

# An adapter of the largest model has a few thousand tensors, about 150 bytes of header each.
_LARGEST_HEADER = 8 * 2**20
_LIBRARIES = ("torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter belongs to."""

    name: str  # hub id, or the last part of a local folder
    family: str = "stable-diffusion"
    fingerprint: str = ""


@dataclass(frozen=True)
class AdapterMetadata:
    """What the maker of an adapter tells its user; nothing of it changes the numbers."""

    base_name: str
    base_family: str = "stable-diffusion"
    base_fingerprint: str | None = None  # taken before the model was cast down; None: taken from the live weights
    trigger: str | None = None
    instance_prompt: str | None = None
    class_prompt: str | None = None
    suggested_strength: float = 1.0
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterHeader:
    """Header of an adapter file."""

    method: str
    pattern: str
    off_diagonals: int
    rank: int | None  # leading singular triplets that were kept; None: all
    targets: str
    components: dict[str, int]  # component -> number of adapted weights
    base: BaseModel
    trigger: str | None = None
    instance_prompt: str | None = None
    class_prompt: str | None = None
    suggested_strength: float = 1.0
    training: dict[str, Any] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose behaviour an adapter may depend on."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def write_adapter(file: str | Path, header: AdapterHeader, tensors: Mapping[str, Tensor]) -> Path:
    """Write ``tensors`` (``<canonical layer name>.values`` -> values) under ``header``, whole or not at all.

    Equal input gives equal bytes. Absolute paths in the header are cut to their last part.

    Raises:
        UserError: a value is NaN or infinite, a name is not canonical, or the file can't be written.
    """
    file = Path(file)
    values = {name: tensors[name].detach().float().cpu().contiguous() for name in sorted(tensors)}
    for name, tensor in values.items():
        _check_tensor(file, name, tensor)
    fields = _without_folders(dataclasses.asdict(header))
    metadata = {METADATA_KEY: json.dumps(fields, sort_keys=True, ensure_ascii=True, allow_nan=False)}
    content = save(values, metadata)
    with replace_when_whole(file) as unfinished:
        unfinished.write_bytes(content)
    return file


def read_header(file: str | Path) -> AdapterHeader:
    """Header of an adapter file, without reading its tensors.

    Raises:
        UserError: no such file, not an adapter of this product, damaged, or of a newer format.
    """
    file = Path(file)
    _check_container(file)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{file} is damaged or no safetensors file: {problem}") from problem
    if METADATA_KEY not in metadata:
        raise UserError(f"{file} is not an svft_diffusion adapter; load a LoRA with pipe.load_lora_weights")
    return _header_from_json(file, metadata[METADATA_KEY])


def read_adapter(file: str | Path) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Header and tensors (float32, CPU) of an adapter file. Never unpickles anything.

    Raises:
        UserError: as `read_header`; or a tensor has a foreign name, type or shape, or holds NaN or infinity; or
            there are not as many as the header says.
    """
    file = Path(file)
    header = read_header(file)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{file} is damaged or no safetensors file: {problem}") from problem
    if not tensors:
        raise UserError(f"{file} holds no tensors")
    for name, tensor in tensors.items():
        _check_tensor(file, name, tensor)
    held = Counter(split_canonical_name(name)[0] for name in tensors)
    for component in {**header.components, **held}:
        expected = header.components.get(component, 0)
        if held[component] != expected:
            raise UserError(
                f"{file} is not whole: its header says {component}: {expected} layers, the file holds {held[component]}"
            )
    return header, tensors


def _check_container(file: Path) -> None:
    """Refuse what can't be a safetensors file of ours before a parser sees it."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(9)
    except OSError as problem:
        raise UserError(f"can't read {file}: {problem.strerror or problem}") from problem
    if len(start) < 9 or start[8:9] != b"{":
        raise UserError(f"{file} is not a safetensors file; pickled files (.bin, .pt, .ckpt) are never opened")
    header_size = struct.unpack("<Q", start[:8])[0]
    if header_size > _LARGEST_HEADER:
        raise UserError(f"{file} has a header of {header_size} bytes, more than any adapter needs")
    if header_size + 8 > size:
        raise UserError(f"{file} is cut short: its header alone needs {header_size + 8} bytes, it has {size}")


def _check_tensor(file: Path, name: str, tensor: Tensor) -> None:
    if not name.endswith(VALUES_SUFFIX):
        raise UserError(f"{file}: unexpected tensor {name!r}; names end in {VALUES_SUFFIX!r}")
    split_canonical_name(name.removesuffix(VALUES_SUFFIX))
    if tensor.ndim != 1 or tensor.dtype != torch.float32:
        raise UserError(f"{file}: {name!r} must be one row of float32 values")
    if not torch.isfinite(tensor).all():
        raise UserError(f"{file}: {name!r} holds NaN or infinite values; the training that made it went wrong")


def _header_from_json(file: Path, text: str) -> AdapterHeader:
    try:
        fields = json.loads(text)
        format_version = fields["format_version"]
        if not isinstance(format_version, int) or format_version < 0:
            raise TypeError("format_version is not a number")
        if format_version > FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {format_version}, this svft_diffusion reads up to {FORMAT_VERSION}: "
                "update svft_diffusion"
            )
        base = BaseModel(**_known_fields(BaseModel, fields["base"]))
        header = AdapterHeader(**{**_known_fields(AdapterHeader, fields), "base": base})
        _check_field_types(header)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as problem:
        raise UserError(f"{file} has a damaged header: {problem}") from problem
    return header


def _known_fields(kind: type[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in dataclasses.fields(kind)}
    return {name: value for name, value in fields.items() if name in names}


def _check_field_types(header: AdapterHeader) -> None:
    """Types that the code relies on; JSON could hold anything in their place."""
    texts = (header.method, header.pattern, header.targets, header.base.name, header.base.fingerprint)
    optional_texts = (header.trigger, header.instance_prompt, header.class_prompt)
    counts = [header.off_diagonals, *header.components.values()] + ([] if header.rank is None else [header.rank])
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a name is not text")
    if not all(text is None or isinstance(text, str) for text in optional_texts):
        raise TypeError("a prompt is not text")
    if not all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts):
        raise TypeError("a count is not a whole number")
    if not isinstance(header.training, dict):
        raise TypeError("the training settings are no object")
    if not header.base.name.isprintable():  # error messages quote it
        raise ValueError("the base model's name is not one line of text")
    if not math.isfinite(header.suggested_strength):
        raise ValueError("suggested_strength is not finite")


def _without_folders(value: Any) -> Any:
    """The same JSON value with every absolute path cut to its last part: it names a place on one machine only."""
    if isinstance(value, dict):
        # A prompt may begin with a slash and is no path.
        return {
            str(key): item if str(key).endswith(("prompt", "trigger")) else _without_folders(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
    return value
