"""Adapter file, format version 1: one safetensors file for a whole pipeline; docs/file_format.md describes it.

Tensors: ``<canonical layer name>.values``, ``.bias``, ``.norm`` and ``.gate`` (float32, one dimension) for what was
trained of a layer, ``.positions`` (int32) where the values stand at places of their own, and ``sketch`` (uint8), the
bases of all layers. Singular factors are not stored: they are recomputed from the base model, whose fingerprint the
header holds, and aligned to the sketch.

Header: the safetensors metadata has the single key ``svft_diffusion`` (the library writes several metadata keys in
random order; with one, the same training gives the same bytes).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from svft_diffusion.errors import UserError
from svft_diffusion.files.basis_records import LayerBasis, unpack_bases
from svft_diffusion.files.header import AdapterHeader, header_from_json, header_to_json
from svft_diffusion.files.names import split_canonical_name
from svft_diffusion.files.tensor_names import POSITIONS, SKETCH, layer_names, split_tensor_name, tensor_name
from svft_diffusion.files.whole_files import replace_when_whole

METADATA_KEY = "svft_diffusion"

# An adapter of the largest model has a few thousand tensors, about 150 bytes of header each.
_LARGEST_HEADER = 8 * 2**20
_DTYPES = {POSITIONS: (torch.int32, "I32", "int32 positions"), SKETCH: (torch.uint8, "U8", "bytes")}
_TRAINED_DTYPE = (torch.float32, "F32", "float32 values")


def write_adapter(file: str | Path, header: AdapterHeader, tensors: Mapping[str, Tensor]) -> Path:
    """Write ``tensors``, named as `read_adapter` gives them, under ``header``, whole or not at all.

    Equal input gives equal bytes. Absolute paths in the header are cut to their last part.

    Raises:
        UserError: what `read_adapter` would refuse, such as NaN values; or the file can't be written.
    """
    file = Path(file)
    contents = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    for name, tensor in contents.items():
        _check_type(file, name, _DTYPES.get(_part(name), _TRAINED_DTYPE)[0] == tensor.dtype, tuple(tensor.shape))
    _check_contents(file, header, contents)
    content = save(contents, {METADATA_KEY: header_to_json(header)})
    with replace_when_whole(file) as unfinished:
        unfinished.write_bytes(content)
    return file


def read_header(file: str | Path) -> AdapterHeader:
    """Header of an adapter file, without reading its tensors.

    Raises:
        UserError: no such file, not an adapter of this product, damaged, or of another format version.
    """
    file = Path(file)
    check_container(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return _header_of(file, opened)
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{file} is damaged or no safetensors file: {problem}") from problem


def read_adapter(file: str | Path) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Header and tensors (CPU) of an adapter file. Never unpickles anything.

    The names, types and shapes of all tensors are checked before the first one is read.

    Raises:
        UserError: as `read_header`; or a tensor has a foreign name, type or shape, holds NaN or infinity, or does
            not go with the others; or there are not as many as the header says.
    """
    file = Path(file)
    check_container(file)
    try:
        with safe_open(file, framework="pt") as opened:
            header = _header_of(file, opened)
            names = sorted(opened.keys())
            for name in names:
                entry = opened.get_slice(name)
                has_type = _DTYPES.get(_part(name), _TRAINED_DTYPE)[1] == entry.get_dtype()
                _check_type(file, name, has_type, tuple(entry.get_shape()))
            tensors = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{file} is damaged or no safetensors file: {problem}") from problem
    _check_contents(file, header, tensors)
    return header, tensors


def bases_of(tensors: Mapping[str, Tensor]) -> dict[str, LayerBasis]:
    """Bases of the layers by canonical name, from the tensors of an adapter; empty where they hold no sketch.

    Raises:
        ValueError: the sketch does not belong to these layers.
    """
    layers = [layer for layer in layer_names(tensors) if tensor_name(layer, "values") in tensors]
    return unpack_bases(tensors[SKETCH], layers) if SKETCH in tensors else {}


def _header_of(file: Path, opened: Any) -> AdapterHeader:
    metadata = opened.metadata() or {}
    if METADATA_KEY not in metadata:
        raise UserError(f"{file} is not an svft_diffusion adapter; load a LoRA with pipe.load_lora_weights")
    return header_from_json(file, metadata[METADATA_KEY])


def check_container(file: Path) -> None:
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


def _part(name: str) -> str:
    return name.rpartition(".")[2]


def _check_type(file: Path, name: str, has_type: bool, shape: tuple[int, ...]) -> None:
    """Refuse a tensor by what the table of contents says of it."""
    if name != SKETCH:
        try:
            split_tensor_name(name)
        except UserError as problem:
            raise UserError(f"{file}: {problem}") from problem
    if not has_type or len(shape) != 1 or shape[0] == 0:
        kind = _DTYPES.get(_part(name), _TRAINED_DTYPE)[2]
        raise UserError(f"{file}: {name!r} must be one row of {kind}")


def _check_contents(file: Path, header: AdapterHeader, tensors: Mapping[str, Tensor]) -> None:
    if not tensors:
        raise UserError(f"{file} holds no tensors")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{file}: {name!r} holds NaN or infinite values; the training that made it went wrong")
    layers = layer_names(tensors)
    held = Counter(split_canonical_name(layer)[0] for layer in layers)
    for component in {**header.components, **held}:
        expected = header.components.get(component, 0)
        if held[component] != expected:
            raise UserError(
                f"{file} is not whole: its header says {component}: {expected} layers, the file holds {held[component]}"
            )
    for layer in layers:
        _check_positions(file, header, layer, tensors)
    if (SKETCH in tensors) != any(tensor_name(layer, "values") in tensors for layer in layers):
        raise UserError(f"{file} is not whole: there is a tensor {SKETCH!r} where layers have values, and only there")
    try:
        bases_of(tensors)
    except ValueError as problem:
        raise UserError(f"{file} has a damaged sketch: {problem}") from problem


def _check_positions(file: Path, header: AdapterHeader, layer: str, tensors: Mapping[str, Tensor]) -> None:
    values = tensors.get(tensor_name(layer, "values"))
    positions = tensors.get(tensor_name(layer, POSITIONS))
    if (positions is not None) != (values is not None and header.has_positions):
        needs = "needs positions" if header.has_positions else "has no use for positions"
        raise UserError(f"{file}: {header.method} with pattern {header.pattern} {needs}, see layer {layer}")
    if positions is None or values is None:
        return
    if len(positions) != len(values):
        raise UserError(f"{file}: layer {layer} has {len(values)} values at {len(positions)} positions")
    if int(positions[0]) < 0 or not (positions[1:] > positions[:-1]).all():
        raise UserError(f"{file}: the positions of layer {layer} are not ascending and distinct")
