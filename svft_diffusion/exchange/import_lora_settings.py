"""What PEFT and diffusers write beside a LoRA's tensors: the numbers that scale its updates."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from svft_diffusion.errors import UserError
from svft_diffusion.exchange.foreign_file import ForeignFile

_PEFT_CONFIG = "adapter_config.json"
_LARGEST_CONFIG = 2**20  # bytes
_LARGEST_ALPHA = 1e30
_PATH = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class LoraSettings:
    """Scales of a LoRA's updates, of one component or of a whole file."""

    alpha: float | None = None  # None: as large as the rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # end of a layer's path -> its alpha
    use_rslora: bool = False

    def scale(self, path: str, rank: int) -> float:
        """``alpha / r`` of the layer at ``path``, or ``alpha / sqrt(r)`` as rank-stabilised LoRA has it."""
        parts = path.split(".")
        ends = (".".join(parts[first:]) for first in range(len(parts)))
        alpha = next((self.alpha_pattern[end] for end in ends if end in self.alpha_pattern), self.alpha)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.use_rslora else rank)


def lora_settings(file: ForeignFile) -> dict[str, LoraSettings]:
    """Settings by component from a diffusers header, or for all components (``""``) from PEFT's file beside it.

    Raises:
        UserError: they are damaged, or make something else than a plain LoRA.
    """
    if LORA_ADAPTER_METADATA_KEY in file.metadata:
        by_component: dict[str, dict[str, Any]] = {}
        for key, value in _parsed(file, file.metadata[LORA_ADAPTER_METADATA_KEY]).items():
            component, _, name = key.partition(".")
            by_component.setdefault(component, {})[name] = value
        return {component: _checked(file, fields) for component, fields in by_component.items()}
    beside = file.path.with_name(_PEFT_CONFIG)
    if not all(name.startswith("base_model.model.") for name in file.shapes) or not beside.is_file():
        return {}
    try:
        if beside.stat().st_size > _LARGEST_CONFIG:
            raise UserError(f"{beside} is too large for PEFT's settings")
        return {"": _checked(file, _parsed(file, beside.read_text(encoding="utf-8")))}
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"can't read {beside}: {problem}") from problem


def _parsed(file: ForeignFile, text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{file.name}: the LoRA's settings are damaged: {problem}") from problem
    if not isinstance(fields, dict):
        raise UserError(f"{file.name}: the LoRA's settings are damaged: no JSON object")
    return fields


def _checked(file: ForeignFile, fields: Mapping[str, Any]) -> LoraSettings:
    if fields.get("use_dora"):
        raise UserError(f"{file.name} is a DoRA, no plain LoRA, and can't be imported")
    alpha, pattern = fields.get("lora_alpha"), fields.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or not all(_is_number(value) for value in pattern.values()):
        raise UserError(f"{file.name}: the LoRA's settings are damaged: alpha_pattern holds no numbers")
    if alpha is not None and not _is_number(alpha):
        raise UserError(f"{file.name}: the LoRA's settings are damaged: lora_alpha is no number")
    # PEFT takes any regular expression; tools write paths, and an expression of a stranger's may take for ever.
    pattern = {key.removeprefix("^").removesuffix("$").replace("\\.", "."): value for key, value in pattern.items()}
    if unknown := next((key for key in pattern if not _PATH.fullmatch(key)), None):
        raise UserError(f"{file.name}: alpha_pattern has {unknown[:100]!r}, which is no path of a layer")
    return LoraSettings(alpha, pattern, bool(fields.get("use_rslora")))


def _is_number(value: object) -> bool:
    # Compared, not converted: JSON holds whole numbers that no float can be.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_ALPHA
