"""Adapters of a pipeline as one file, and how they get on: what `svft-diffusion blend` does, and the app."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svft_diffusion.adapters import save_adapter
from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.algebra.blend_metadata import BlendSource, blend_metadata, stored_dtype
from svft_diffusion.algebra.combine import combine, replace_sources
from svft_diffusion.algebra.interference import Interference, interference
from svft_diffusion.algebra.layout import check_methods
from svft_diffusion.algebra.style import style_mix
from svft_diffusion.errors import UserError
from svft_diffusion.files import AdapterHeader
from svft_diffusion.files.tensor_names import TRAINED_PARTS
from svft_diffusion.models.loading import base_display_name

_LONGEST_TEXT = 200  # characters of a title or a trigger


@dataclass(frozen=True)
class BlendFacts:
    """What the maker of a blend says of it; None: what follows from its sources.

    Attributes:
        title, trigger: for people.
        value_dtype: of the values in the file, ``float32`` or ``float16``.

    Raises:
        UserError: a title or a trigger is no short line of text.
    """

    title: str | None = None
    trigger: str | None = None
    value_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("title", "trigger"):
            text = getattr(self, name)
            if text is not None and not (text.isprintable() and 0 < len(text) <= _LONGEST_TEXT):
                raise UserError(f"the {name} must be one line of 1 to {_LONGEST_TEXT} characters")


def check_blend(
    adapters: Sequence[tuple[str, AdapterHeader, Mapping[str, Tensor]]],
    weights: Sequence[AdapterWeight],
    *,
    value_dtype: str | None = None,
    compared_only: bool = False,
) -> None:
    """Refuse what can't become one adapter, before a base model is loaded.

    Args:
        adapters: what people call them, and what `read_adapter` gives.
        weights: of each.
        value_dtype: as in `BlendFacts`.
        compared_only: they are compared, and no file is written.

    Raises:
        UserError: methods that have no sum, or a weight too large for the numbers to be stored.
    """
    if not compared_only:
        check_methods({name: header.method for name, header, _ in adapters if header.train_values})
    dtype = "float32" if compared_only else value_dtype or stored_dtype(header for _, header, _ in adapters)
    for (name, _, tensors), weight in zip(adapters, weights, strict=True):
        _check_range(name, tensors, weight, dtype)


def base_name_of(headers: Sequence[AdapterHeader], base: str, *, is_known: bool) -> str:
    """What a file says of the base ``base`` that its sources were loaded on.

    Args:
        is_known: it is the base that they were trained on; then it keeps the name that they have for it, while here it
            may be a folder of any name.
    """
    names = {header.base.name for header in headers}
    return names.pop() if is_known and len(names) == 1 else base_display_name(base)


def compare_sources(
    pipe: object, sources: Mapping[str, BlendSource], *, balance: bool = False
) -> tuple[dict[str, BlendSource], Interference]:
    """How the adapters ``sources`` of a pipeline, those at weight 0 aside, get on.

    Args:
        sources: by name in the pipeline.
        balance: compare them at the balancing weights.

    Returns:
        The sources at the weights at which they were compared, and the report.

    Raises:
        UserError: as `interference`.
    """
    found = interference(pipe, {name: source.weight for name, source in sources.items() if source.weight != 0})
    if balance:
        found = replace(interference(pipe, found.balancing), balancing=found.balancing)
    at_weights = {
        name: replace(source, weight=found.weights.get(name, source.weight)) for name, source in sources.items()
    }
    return at_weights, found


def write_blend(
    pipe: object, sources: Mapping[str, BlendSource], name: str, file: Path, facts: BlendFacts, *, base_name: str
) -> None:
    """Put the sum of ``sources`` into their place in a pipeline, as adapter ``name``, and write it to a file.

    Args:
        sources: by name in the pipeline; they are unloaded.
        base_name: see `base_name_of`.

    Raises:
        UserError: as `combine`; or a sum is too large for the file's dtype, or the file can't be written.
    """
    combine(pipe, {source: described.weight for source, described in sources.items()}, name)
    _write(pipe, sources, name, file, facts, base_name=base_name, operation="sum")


def write_style_mix(
    pipe: object,
    sources: Mapping[str, BlendSource],
    name: str,
    file: Path,
    facts: BlendFacts,
    *,
    base_name: str,
    geometry_blocks: Sequence[str] | None = None,
) -> list[str]:
    """`write_blend` of the geometry layers of the first of two sources and all others of the second.

    Returns:
        The geometry blocks, as `style_mix`.

    Raises:
        UserError: as `write_blend` and `style_mix`.
    """
    geometry, appearance = sources
    blocks = style_mix(pipe, geometry, appearance, name, geometry_blocks)
    _write(pipe, sources, name, file, facts, base_name=base_name, operation="style mix", geometry_blocks=blocks)
    return blocks


def _write(
    pipe: object,
    sources: Mapping[str, BlendSource],
    name: str,
    file: Path,
    facts: BlendFacts,
    *,
    base_name: str,
    operation: str,
    **details: Any,
) -> None:
    replace_sources(pipe, list(sources), name)
    metadata = blend_metadata(
        list(sources.values()), operation, base_name=base_name, value_dtype=facts.value_dtype, **details
    )
    if facts.title is not None:
        metadata = replace(metadata, title=facts.title)
    if facts.trigger is not None:
        metadata = replace(metadata, trigger=facts.trigger)
    save_adapter(pipe, name, file, metadata=metadata)


def _check_range(name: str, tensors: Mapping[str, Tensor], weight: AdapterWeight, dtype: str) -> None:
    limit = torch.finfo(getattr(torch, dtype)).max
    for tensor_name, tensor in tensors.items():
        if tensor_name.rpartition(".")[2] not in TRAINED_PARTS or not tensor.is_floating_point():
            continue
        largest = float(tensor.abs().max()) * _largest(weight, tensor_name.partition(".")[0])
        if not largest <= limit:
            reached = f"values up to {largest:.3g}" if math.isfinite(largest) else "values beyond all limits"
            raise UserError(
                f"{name} at weight {_largest(weight):g} has {reached}, and {dtype} ends at {limit:.5g}; "
                "use a smaller weight"
            )


def _largest(weight: AdapterWeight, component: str | None = None) -> float:
    """The largest size of a weight, in a component alone or in all."""
    if not isinstance(weight, Mapping):
        return abs(weight)
    if component is not None:
        weight = {component: weight.get(component, 0.0)}
    parts = [part.values() if isinstance(part, Mapping) else [part] for part in weight.values()]
    return max((abs(number) for part in parts for number in part), default=0.0)
