"""Adapter file, format version 1: one safetensors file for a whole pipeline; docs/file_format.md describes it.

Tensors: ``<canonical layer name>.values``, ``.bias``, ``.norm`` and ``.gate`` (float32 or float16, one dimension) for
what was trained of a layer, ``.positions`` (int32) where the values stand at places of their own, ``sketch`` (uint8),
the bases of all layers, and ``<text encoder>.tokens`` (two dimensions), the embeddings of learned tokens. Singular
factors are not stored: they are recomputed from the base model, of whose weights the header holds digests, and aligned
to the sketch.

Header: the entry ``svft_diffusion`` is JSON with all that reading needs, ``svft_diffusion.digest`` a SHA-256 of
everything else in the file, and other entries repeat what other tools show.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from svft_diffusion.errors import UserError
from svft_diffusion.files.basis_records import LayerBasis, unpack_bases
from svft_diffusion.files.carrier import content_of_adapter
from svft_diffusion.files.container import (
    Container,
    container_bytes,
    content_digest,
    dtype_name,
    one_line,
    read_bytes,
    read_container,
    tensor_bytes,
)
from svft_diffusion.files.header import VALUE_DTYPES, AdapterHeader, header_from_json, header_to_json
from svft_diffusion.files.model_spec import THUMBNAIL_KEY, shown_metadata, thumbnail_bytes
from svft_diffusion.files.names import TEXT_ENCODERS, split_canonical_name
from svft_diffusion.files.tensor_names import (
    POSITIONS,
    SKETCH,
    TOKENS,
    TRAINED_PARTS,
    is_tokens,
    layer_names,
    split_tensor_name,
    tensor_name,
)
from svft_diffusion.files.whole_files import replace_when_whole

METADATA_KEY = "svft_diffusion"
DIGEST_KEY = "svft_diffusion.digest"

_STORED_AS = {"float32": "F32", "float16": "F16"}  # what the container calls them


def write_adapter(file: str | Path, header: AdapterHeader, tensors: Mapping[str, Tensor]) -> Path:
    """Write ``tensors``, named as `read_adapter` gives them, under ``header``, whole or not at all.

    Equal input gives equal bytes. Absolute paths in the header are cut to their last part.

    Raises:
        UserError: what `read_adapter` would refuse, such as NaN values; or the file can't be written.
    """
    file = Path(file)
    content = adapter_bytes(header, tensors, label=str(file))
    with replace_when_whole(file) as unfinished:
        unfinished.write_bytes(content)
    return file


def adapter_bytes(header: AdapterHeader, tensors: Mapping[str, Tensor], *, label: str = "the adapter") -> bytes:
    """What `write_adapter` writes. ``label`` is what messages call it. Raises as `write_adapter`."""
    contents = {name: stored_tensor(name, tensor, header.value_dtype) for name, tensor in tensors.items()}
    for name, tensor in contents.items():
        _check_type(label, header, name, dtype_name(tensor), tuple(tensor.shape))
    _check_contents(label, header, contents)
    text = header_to_json(header)
    # As a reader sees it: without folders.
    plain = replace(header_from_json(label, text), thumbnail=header.thumbnail)
    try:
        metadata = {METADATA_KEY: text, **shown_metadata(plain, contents)}
    except ValueError as problem:
        raise UserError(f"{label}: {problem}") from problem
    parts = ((name, dtype_name(held), held.shape, tensor_bytes(held)) for name, held in sorted(contents.items()))
    content = container_bytes(contents, metadata | {DIGEST_KEY: content_digest(parts, metadata)})
    read_container(content, label)  # what is larger than a reader takes is not written
    return content


def read_header(file: str | Path) -> AdapterHeader:
    """Header of an adapter file, of whose content the digest is checked.

    Raises:
        UserError: no such file, not an adapter of this product, damaged, or of another format version.
    """
    return contents_from_bytes(read_bytes(file), str(file))[0]


def contents_from_bytes(data: bytes, label: str) -> tuple[AdapterHeader, list[str]]:
    """Header, and canonical names of the adapted layers, of what was read already. Raises as `read_header`."""
    container = _container_of(data, label)
    return _header_of(label, container), layer_names(container.entries)


def read_adapter(file: str | Path) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Header and tensors (CPU) of an adapter file, or of a PNG picture that carries one. Never unpickles anything.

    What was trained comes as float32, however it is stored. Names, types, shapes and the digest of all content are
    checked before the first tensor is made.

    Raises:
        UserError: as `read_header`; or a tensor has a foreign name, type or shape, holds NaN or infinity, or does
            not go with the others; or there are not as many as the header says.
    """
    return adapter_from_bytes(read_bytes(file), str(file))


def adapter_from_bytes(data: bytes, label: str) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """`read_adapter` for what was read already; ``label`` is what messages call it."""
    container = _container_of(data, label)
    header = _header_of(label, container)
    for name, entry in container.entries.items():
        _check_type(label, header, name, entry.dtype, entry.shape)
    try:
        stored = load(container.data)
    except SafetensorError as problem:
        raise UserError(f"{label} is damaged or no safetensors file: {one_line(problem)}") from problem
    # One at a time, so that the file is never there three times.
    tensors = {name: _widened(stored.pop(name)) for name in sorted(stored)}
    _check_contents(label, header, tensors)
    return header, tensors


def bases_of(tensors: Mapping[str, Tensor]) -> dict[str, LayerBasis]:
    """Bases of the layers by canonical name, from the tensors of an adapter; empty where they hold no sketch.

    Raises:
        ValueError: the sketch does not belong to these layers.
    """
    layers = [layer for layer in layer_names(tensors) if tensor_name(layer, "values") in tensors]
    return unpack_bases(tensors[SKETCH], layers) if SKETCH in tensors else {}


def _container_of(data: bytes, label: str) -> Container:
    return read_container(content_of_adapter(data, label), label)


def _header_of(label: str, container: Container) -> AdapterHeader:
    metadata = container.metadata
    if METADATA_KEY not in metadata:
        raise UserError(
            f"{label} is not an svft_diffusion adapter: `svft-diffusion import` turns a LoRA, SVDiff or SVFT file into "
            "one, and pipe.load_lora_weights loads a LoRA as it is"
        )
    header = header_from_json(label, metadata[METADATA_KEY])  # first: a later format may have other thumbnails
    try:
        thumbnail = thumbnail_bytes(metadata.get(THUMBNAIL_KEY))
    except ValueError as problem:
        raise UserError(f"{label} has a damaged header: {problem}") from problem
    others = {key: text for key, text in metadata.items() if key != DIGEST_KEY}
    parts = (
        (name, container.entries[name].dtype, container.entries[name].shape, container.bytes_of(name))
        for name in sorted(container.entries)
    )
    if content_digest(parts, others) != metadata.get(DIGEST_KEY):
        raise UserError(
            f"{label} does not hold what was written into it (its digest differs): it was damaged, or changed by "
            "another program; get it again"
        )
    return replace(header, thumbnail=thumbnail)


def stored_tensor(name: str, tensor: Tensor, value_dtype: str) -> Tensor:
    """The tensor as a file with ``value_dtype`` holds it: what was trained in that dtype, the rest as it is.

    Raises:
        UserError: values can't be stored in that dtype.
    """
    if value_dtype not in VALUE_DTYPES:
        raise UserError(f"values can be stored as {', '.join(VALUE_DTYPES)}, not as {value_dtype!r}")
    trained = name.rpartition(".")[2] in (*TRAINED_PARTS, TOKENS) and tensor.is_floating_point()
    stored = tensor.detach().cpu().to(getattr(torch, value_dtype) if trained else tensor.dtype)
    if stored.dtype == torch.float16 and torch.isinf(stored).any() and torch.isfinite(tensor).all():
        raise UserError(f"{name!r} has a value too large for float16; store it as float32")
    return stored


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _check_type(label: str, header: AdapterHeader, name: str, dtype: str, shape: Sequence[int]) -> None:
    """Refuse a tensor by what the table of contents says of it."""
    component, _, part = name.rpartition(".")
    wanted, dimensions, kind = _STORED_AS[header.value_dtype], 1, f"one row of {header.value_dtype} values"
    if name == SKETCH:
        wanted, kind = "U8", "one row of bytes"
    elif is_tokens(name):
        dimensions, kind = 2, f"a table of {header.value_dtype} values"
        if component not in TEXT_ENCODERS:
            raise UserError(f"{label}: {name!r} are tokens of no text encoder")
    else:
        try:
            split_tensor_name(name)
        except UserError as problem:
            raise UserError(f"{label}: {problem}") from problem
        if part == POSITIONS:
            wanted, kind = "I32", "one row of int32 positions"
    if dtype != wanted or len(shape) != dimensions or 0 in shape:
        raise UserError(f"{label}: {name!r} must be {kind}")


def _check_contents(label: str, header: AdapterHeader, tensors: Mapping[str, Tensor]) -> None:
    if not tensors:
        raise UserError(f"{label} holds no tensors")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise UserError(f"{label}: {name!r} holds NaN or infinite values; the training that made it went wrong")
    layers = layer_names(tensors)
    held = Counter(split_canonical_name(layer)[0] for layer in layers)
    for component in {**header.components, **held}:
        expected = header.components.get(component, 0)
        if held[component] != expected:
            raise UserError(
                f"{label} is not whole: its header says {component}: {expected} layers, "
                f"the file holds {held[component]}"
            )
    known = len(header.base.digests.stored)
    if known != len(layers):
        raise UserError(f"{label} is not whole: it has digests of {known} weights for {len(layers)} layers")
    for layer in layers:
        _check_positions(label, header, layer, tensors)
    _check_tokens(label, header, tensors)
    if (SKETCH in tensors) != any(tensor_name(layer, "values") in tensors for layer in layers):
        raise UserError(f"{label} is not whole: there is a tensor {SKETCH!r} where layers have values, and only there")
    try:
        bases_of(tensors)
    except ValueError as problem:
        raise UserError(f"{label} has a damaged sketch: {problem}") from problem


def _is_finite(tensor: Tensor) -> bool:
    """Without a second tensor of its size, which `torch.isfinite` makes: the largest adapters fill the memory."""
    low, high = tensor.aminmax()  # NaN passes through
    return math.isfinite(low) and math.isfinite(high)


def _check_positions(label: str, header: AdapterHeader, layer: str, tensors: Mapping[str, Tensor]) -> None:
    values = tensors.get(tensor_name(layer, "values"))
    positions = tensors.get(tensor_name(layer, POSITIONS))
    if (positions is not None) != (values is not None and header.has_positions):
        needs = "needs positions" if header.has_positions else "has no use for positions"
        raise UserError(f"{label}: {header.method} with pattern {header.pattern} {needs}, see layer {layer}")
    if positions is None or values is None:
        return
    if len(positions) != len(values):
        raise UserError(f"{label}: layer {layer} has {len(values)} values at {len(positions)} positions")
    if int(positions[0]) < 0 or not (positions[1:] > positions[:-1]).all():
        raise UserError(f"{label}: the positions of layer {layer} are not ascending and distinct")


def _check_tokens(label: str, header: AdapterHeader, tensors: Mapping[str, Tensor]) -> None:
    """As many rows as tokens, for exactly the text encoders that learned some."""
    rows = {name.rpartition(".")[0]: len(table) for name, table in tensors.items() if is_tokens(name)}
    if rows != {component: len(tokens) for component, tokens in header.tokens.items()}:
        raise UserError(f"{label} is not whole: its header names other learned tokens than the file holds")
