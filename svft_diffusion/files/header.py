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
from svft_diffusion.files.container import one_line, parse_json
from svft_diffusion.files.weight_digests import BaseDigests, digests_from_json

FORMAT_VERSION = 1
VALUE_DTYPES = ("float32", "float16")
_LIBRARIES = ("torch", "diffusers", "transformers", "peft")
_SHORT_FINGERPRINT = 8
_LONGEST_NAME = 256
# Fields that may begin with a slash and are no path.
_NO_PATHS = ("prompt", "trigger", "word", "title", "description", "tokens", "digests")


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter belongs to."""

    name: str  # hub id, or the last part of a local folder
    family: str = "stable-diffusion"
    architecture: str = ""  # as ModelSpec calls it, such as stable-diffusion-v1; "" where it has no name there
    digests: BaseDigests = field(default_factory=BaseDigests)

    @property
    def fingerprint(self) -> str:
        """One short text for all adapted weights, see `BaseDigests.fingerprint`."""
        return self.digests.fingerprint

    @property
    def short_fingerprint(self) -> str:
        """The first digits of it, for messages."""
        return self.fingerprint.partition(":")[2][:_SHORT_FINGERPRINT] or "none"


@dataclass(frozen=True)
class AdapterMetadata:
    """What the maker of an adapter tells its user; nothing but ``value_dtype`` changes the numbers.

    Attributes:
        base_name: hub id or folder of the base; of a folder only the last part is written.
        base_family: the kind of pipeline.
        base_architecture: ModelSpec's name for it; None: found from the models.
        base_digests: of the adapted weights, where they are known already; None: taken from the weights.
        trigger: words that call the subject.
        class_word: what the subject is, such as ``dog``.
        instance_prompt, class_prompt: those of the training.
        title, description: for people.
        suggested_strength, strength_range: where the pictures are good.
        training: settings, as plain values.
        thumbnail: a JPEG picture of at most 256 x 256 pixels.
        value_dtype: how the trained numbers are stored, ``float32`` or ``float16``.
    """

    base_name: str
    base_family: str = "stable-diffusion"
    base_architecture: str | None = None
    base_digests: BaseDigests | None = None
    trigger: str | None = None
    class_word: str | None = None
    instance_prompt: str | None = None
    class_prompt: str | None = None
    title: str | None = None
    description: str | None = None
    suggested_strength: float = 1.0
    strength_range: tuple[float, float] = (0.0, 1.0)
    training: dict[str, Any] = field(default_factory=dict)
    thumbnail: bytes | None = None
    value_dtype: str = "float32"


@dataclass(frozen=True)
class AdapterHeader:
    """Header of an adapter file; the fields of `svft_diffusion.adapters.SpectralConfig` mean what they mean there,
    and those of `AdapterMetadata` what they mean in it."""

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
    value_dtype: str = "float32"
    tokens: dict[str, list[str]] = field(default_factory=dict)  # text encoder -> the tokens that it learned
    trigger: str | None = None
    class_word: str | None = None
    instance_prompt: str | None = None
    class_prompt: str | None = None
    title: str | None = None
    description: str | None = None
    suggested_strength: float = 1.0
    strength_range: tuple[float, float] = (0.0, 1.0)
    training: dict[str, Any] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    thumbnail: bytes | None = None  # not in the JSON: in an entry of its own, where other tools look for it
    format_version: int = FORMAT_VERSION

    @property
    def has_positions(self) -> bool:
        """Whether a layer's values stand at places that the file lists."""
        return self.pattern in ("random", "top_k", "listed") or self.select == "random"


def makers_fields(said: AdapterMetadata | AdapterHeader) -> dict[str, Any]:
    """The fields that a header takes from what the maker of an adapter says, as they are."""
    shared = {item.name for item in dataclasses.fields(AdapterMetadata)}
    return {item.name: getattr(said, item.name) for item in dataclasses.fields(AdapterHeader) if item.name in shared}


def metadata_of(header: AdapterHeader) -> AdapterMetadata:
    """What the maker of an adapter said, to save it again with. The digests are taken from the base at hand."""
    return AdapterMetadata(
        base_name=header.base.name,
        base_family=header.base.family,
        base_architecture=header.base.architecture,
        **makers_fields(header),
    )


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
    fields: dict[str, Any] = {item.name: getattr(header, item.name) for item in dataclasses.fields(header)}
    del fields["thumbnail"]
    fields["base"] = {**vars(header.base), "digests": header.base.digests.to_json()}
    return json.dumps(_without_folders(fields), sort_keys=True, ensure_ascii=True, allow_nan=False)


def header_from_json(label: str, text: str) -> AdapterHeader:
    """The header that the file called ``label`` holds as ``text``; the thumbnail is not in it.

    A field that this version does not know is passed over: what would change the meaning of a file comes with a
    higher format version.

    Raises:
        UserError: damaged, or of another format version.
    """
    try:
        fields = parse_json(text)
        _check_version(label, fields["format_version"])
        base_fields = _known_fields(BaseModel, fields["base"])
        base = BaseModel(**{**base_fields, "digests": digests_from_json(base_fields["digests"])})
        strength_range = tuple(fields.get("strength_range", (0.0, 1.0)))
        known = {**_known_fields(AdapterHeader, fields), "strength_range": strength_range, "thumbnail": None}
        header = AdapterHeader(**{**known, "base": base})
        _check_field_types(header)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as problem:
        raise UserError(f"{label} has a damaged header: {one_line(problem)}") from problem
    return header


def _check_version(label: str, format_version: object) -> None:
    if not _is_count(format_version):
        raise TypeError("format_version is not a number")
    if format_version > FORMAT_VERSION:
        raise UserError(
            f"{label} has format version {str(format_version)[:20]}, this svft_diffusion reads up to {FORMAT_VERSION}: "
            "update svft_diffusion"
        )
    if format_version < FORMAT_VERSION:
        raise UserError(
            f"{label} has format version {format_version}, which was never released: "
            "train it again, or use the version of svft_diffusion that wrote it"
        )


def _known_fields(kind: type[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in dataclasses.fields(kind)}
    return {name: value for name, value in fields.items() if name in names}


def _check_field_types(header: AdapterHeader) -> None:
    """Types that the code relies on; JSON could hold anything in their place."""
    base = header.base
    names = (
        header.method, header.pattern, header.targets, header.init, header.norm_shift, base.name, base.family,
        base.architecture, *header.components, *header.libraries, *header.libraries.values(),
    )  # fmt: skip
    optional_texts = (
        header.select, header.trigger, header.class_word, header.instance_prompt, header.class_prompt, header.title,
        header.description,
    )  # fmt: skip
    switches = (header.train_values, header.train_bias)
    fraction = 1.0 if header.fraction is None else header.fraction
    numbers = (header.suggested_strength, *header.strength_range, fraction)
    # Error messages quote them.
    if not all(isinstance(name, str) and name.isprintable() and len(name) <= _LONGEST_NAME for name in names):
        raise TypeError("a name is not one short line of text")
    if not all(text is None or isinstance(text, str) for text in optional_texts):
        raise TypeError("a prompt, a title or a selection is not text")
    if not all(_is_count(count) for count in (header.off_diagonals, *header.components.values())):
        raise TypeError("a count is not a whole number")
    if not (header.rank is None or _is_count(header.rank)):
        raise TypeError("the rank is not a whole number")
    if not _is_whole(header.seed) or not -(2**63) <= header.seed < 2**63:
        raise TypeError("the seed is no whole number of 64 bits")
    if not all(isinstance(switch, bool) for switch in switches) or not isinstance(header.train_norm, bool | None):
        raise TypeError("a switch is neither true nor false")
    if not isinstance(header.training, dict):
        raise TypeError("the training settings are no object")
    if not all(_is_number(number) for number in numbers) or len(header.strength_range) != 2:
        raise ValueError("a strength or fraction is no finite number")
    if header.value_dtype not in VALUE_DTYPES:
        raise ValueError(f"values are stored as {', '.join(VALUE_DTYPES)}, not as it says")
    _check_tokens(header.tokens)


def _check_tokens(tokens: Any) -> None:
    if not isinstance(tokens, dict) or not all(isinstance(listed, list) and listed for listed in tokens.values()):
        raise TypeError("the learned tokens are no lists")
    for listed in tokens.values():
        if not all(isinstance(token, str) and token.isprintable() and token.strip() == token != "" for token in listed):
            raise ValueError("a learned token is not one word")
        if len(set(listed)) != len(listed):
            raise ValueError("a learned token stands twice")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> TypeGuard[int]:
    return _is_whole(value) and value >= 0


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _without_folders(value: Any) -> Any:
    """The same JSON value with every absolute path cut to its last part: it names a place on one machine only."""
    if isinstance(value, dict):
        return {
            str(key): item if str(key).endswith(_NO_PATHS) else _without_folders(item) for key, item in value.items()
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
