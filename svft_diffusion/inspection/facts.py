"""Everything that an adapter file tells, without its base model: the header, the sizes, the norms of its update."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from svft_diffusion.files import (
    SKETCH,
    TRAINED_PARTS,
    AdapterHeader,
    adapter_from_bytes,
    layer_names,
    tensor_name,
)
from svft_diffusion.files.adapter_file import DIGEST_KEY, METADATA_KEY
from svft_diffusion.files.container import Container, read_container
from svft_diffusion.files.model_spec import THUMBNAIL_KEY
from svft_diffusion.files.names import block_of, natural_order
from svft_diffusion.files.tensor_names import is_tokens
from svft_diffusion.spectral import gated_values


@dataclass(frozen=True)
class UpdateNorm:
    """The size of the update in a layer, or in a block of layers, at strength 1."""

    name: str  # canonical, of the layer or block
    layers: int
    values: int  # numbers that were trained there
    update: float  # Frobenius norm of the change of the weight matrices
    shifts: float  # norm of the changes of biases and norm weights


@dataclass(frozen=True)
class FileSizes:
    """Bytes of a file, and what they are spent on."""

    file: int
    header: int
    values: int  # what was trained, and the positions that it stands at
    sketch: int  # what aligns it to the base at hand


@dataclass(frozen=True)
class AdapterFacts:
    """What `facts_of_adapter` finds."""

    label: str
    sha256: str
    header: AdapterHeader
    sizes: FileSizes
    trained: dict[str, int]  # part -> numbers that were trained: values, bias, norm, gate, tokens
    layers: list[UpdateNorm]
    blocks: list[UpdateNorm]
    metadata: dict[str, str]  # entries for other tools

    @property
    def exact_norms(self) -> bool:
        """Whether ``update`` is the norm itself: the relu of SVDiff stops a shift at its singular value."""
        return self.header.method != "svdiff"

    def to_json(self) -> dict[str, Any]:
        """The facts as plain values."""
        header = self.header
        fields = {item.name: getattr(header, item.name) for item in dataclasses.fields(header)}
        base = {name: value for name, value in vars(header.base).items() if name != "digests"}
        return {
            **fields,
            "file": self.label,
            "sha256": self.sha256,
            "bytes": vars(self.sizes),
            "base": {**base, "fingerprint": header.base.fingerprint, "digests": numbers_of_digests(header)},
            "thumbnail": None if header.thumbnail is None else len(header.thumbnail),
            "trained": self.trained,
            "norms_are": "exact" if self.exact_norms else "upper bounds",
            "blocks": [vars(block) for block in self.blocks],
            "layers": [vars(layer) for layer in self.layers],
            "metadata": self.metadata,
        }


def facts_of_adapter(content: bytes, label: str) -> AdapterFacts:
    """The facts of an adapter, given the bytes of its file.

    Raises:
        UserError: it is not one, damaged, or not whole: everything is checked that `read_adapter` checks.
    """
    header, tensors = adapter_from_bytes(content, label)
    container = read_container(content, label)
    layers = [_norm_of_layer(layer, tensors, header) for layer in layer_names(tensors)]
    hidden = (METADATA_KEY, DIGEST_KEY, THUMBNAIL_KEY)
    return AdapterFacts(
        label=label,
        sha256=hashlib.sha256(content).hexdigest(),
        header=header,
        sizes=_sizes(container),
        trained=_trained(tensors),
        layers=layers,
        blocks=_norms_of_blocks(layers),
        metadata={key: text for key, text in sorted(container.metadata.items()) if key not in hidden},
    )


def numbers_of_digests(header: AdapterHeader) -> dict[str, int]:
    """How many weights of the base the file knows, by the precision of the digest."""
    digests = header.base.digests
    return {name: len(kind) for name, kind in digests._asdict().items() if kind is not None}


def _norm_of_layer(layer: str, tensors: Mapping[str, Tensor], header: AdapterHeader) -> UpdateNorm:
    # U and V have orthonormal columns, so U M V^T is as long as M, and every value is one entry of M.
    parts = {
        part: tensors[tensor_name(layer, part)].double()
        for part in TRAINED_PARTS
        if tensor_name(layer, part) in tensors
    }
    values = parts.get("values")
    if values is not None and "gate" in parts:
        values = gated_values(values, parts["gate"])
    return UpdateNorm(
        name=layer,
        layers=1,
        values=sum(part.numel() for part in parts.values()),
        update=0.0 if values is None else float(values.norm()),
        shifts=math.hypot(*(float(parts[part].norm()) for part in ("bias", "norm") if part in parts)),
    )


def _norms_of_blocks(layers: Sequence[UpdateNorm]) -> list[UpdateNorm]:
    blocks: dict[str, list[UpdateNorm]] = {}
    for layer in layers:
        blocks.setdefault(block_of(layer.name), []).append(layer)
    return [
        UpdateNorm(
            name=name,
            layers=len(inside),
            values=sum(layer.values for layer in inside),
            update=math.hypot(*(layer.update for layer in inside)),
            shifts=math.hypot(*(layer.shifts for layer in inside)),
        )
        for name, inside in sorted(blocks.items(), key=lambda item: natural_order(item[0]))
    ]


def _trained(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        part = name.rpartition(".")[2]
        if part in TRAINED_PARTS or is_tokens(name):
            counts[part] = counts.get(part, 0) + tensor.numel()
    return counts


def _sizes(container: Container) -> FileSizes:
    sizes = {name: entry.end - entry.start for name, entry in container.entries.items()}
    sketch = sizes.pop(SKETCH, 0)
    values = sum(sizes.values())
    return FileSizes(len(container.data), len(container.data) - values - sketch, values, sketch)
