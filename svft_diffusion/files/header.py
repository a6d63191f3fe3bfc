"""Header of an adapter file: what it holds, of which base model, made how; and its JSON spelling.

The JSON has sorted keys and holds no time and no folder of the machine that wrote it, so that the same training
gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeGuard

from svft_diffusion.errors import UserError

FORMAT_VERSION = 1
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
    """Header of an adapter file; the fields of `svft_diffusion.adapters.SpectralConfig` mean what they mean there."""

    method: str
    pattern: str
    off_diagonals: int
    rank: int | None
    targets: str
    components: dict[str, int]  # component -> number of adapted layers
    base: BaseModel
    fraction: float | None = None
    select: str | None = None
    init: str = "zero"
    seed: int = 0
    train_values: bool = True
    train_bias: bool = False
    train_norm: bool | None = None
    norm_shift: str = "vector"
    trigger: str | None = None
    instance_prompt: str | None = None
    class_prompt: str | None = None
    suggested_strength: float = 1.0
    training: dict[str, Any] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def has_positions(self) -> bool:
        """Whether a layer's values stand at places that the file lists."""
        return self.pattern in ("random", "top_k") or self.select == "random"


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose behaviour an adapter may depend on."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def header_to_json(header: AdapterHeader) -> str:
    """The header as text: equal headers give equal text. Absolute paths in it are cut to their last part."""
    fields = _without_folders(dataclasses.asdict(header))
    return json.dumps(fields, sort_keys=True, ensure_ascii=True, allow_nan=False)


def header_from_json(file: Path, text: str) -> AdapterHeader:
    """The header that ``file`` holds as ``text``.

    Raises:
        UserError: damaged, or of another format version.
    """
    try:
        fields = json.loads(text)
        format_version = fields["format_version"]
        if not _is_count(format_version):
            raise TypeError("format_version is not a number")
        if format_version > FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {format_version}, this svft_diffusion reads up to {FORMAT_VERSION}: "
                "update svft_diffusion"
            )
        if format_version < FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {format_version}, which was never released: "
                "train it again, or use the version of svft_diffusion that wrote it"
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
    base = header.base
    texts = (header.method, header.pattern, header.targets, header.init, header.norm_shift, base.name, base.fingerprint)
    optional_texts = (header.select, header.trigger, header.instance_prompt, header.class_prompt)
    counts = [header.off_diagonals, *header.components.values()]
    switches = (header.train_values, header.train_bias)
    numbers = [header.suggested_strength, *([] if header.fraction is None else [header.fraction])]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a name is not text")
    if not all(text is None or isinstance(text, str) for text in optional_texts):
        raise TypeError("a prompt or a selection is not text")
    if not all(_is_count(count) for count in counts) or not (header.rank is None or _is_count(header.rank)):
        raise TypeError("a count is not a whole number")
    if not _is_whole(header.seed) or not -(2**63) <= header.seed < 2**63:
        raise TypeError("the seed is no whole number of 64 bits")
    if not all(isinstance(switch, bool) for switch in switches) or not isinstance(header.train_norm, bool | None):
        raise TypeError("a switch is neither true nor false")
    if not isinstance(header.training, dict):
        raise TypeError("the training settings are no object")
    if not base.name.isprintable():  # error messages quote it
        raise ValueError("the base model's name is not one line of text")
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError("a number is not finite")


def _is_count(value: object) -> TypeGuard[int]:
    return _is_whole(value) and value >= 0


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


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
