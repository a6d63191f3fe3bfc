"""The tensor ``sketch`` of an adapter file: in which basis of singular vectors each layer's values were trained.

One record for each layer that has values, in the order of the layers' canonical names, without gaps::

    length    uint32, little endian    number of bytes of the basis sketch
    sketch    length bytes             see `svft_diffusion.spectral.basis_sketch`
    probes    4 x float32, l. e.       see `svft_diffusion.spectral.probes`
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NUMBER_OF_PROBES = 4
_LENGTH = struct.Struct("<I")
_PROBES_BYTES = 4 * NUMBER_OF_PROBES


class LayerBasis(NamedTuple):
    """The basis of one layer, as a file describes it."""

    sketch: Tensor  # uint8, one dimension: what aligns another decomposition to the one that was trained with
    probes: Tensor  # (4,) float32: samples of the layer's update, to measure what the alignment left


def pack_bases(bases: Mapping[str, LayerBasis]) -> Tensor:
    """Records of all layers as one row of bytes."""
    content = bytearray()
    for layer in sorted(bases):
        sketch, probes = bases[layer]
        sketch_bytes = sketch.cpu().contiguous().numpy().tobytes()
        content += _LENGTH.pack(len(sketch_bytes)) + sketch_bytes
        content += probes.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes()
    return torch.from_numpy(np.frombuffer(bytes(content), dtype=np.uint8).copy())


def unpack_bases(packed: Tensor, layers: Sequence[str]) -> dict[str, LayerBasis]:
    """The records again, given the names of the layers that have one.

    Raises:
        ValueError: the bytes are not that many records, or a probe is NaN or infinite.
    """
    content = packed.cpu().contiguous().numpy().tobytes()
    bases = {}
    position = 0
    for layer in sorted(layers):
        start = position + _LENGTH.size
        if start > len(content):
            raise ValueError(f"it ends before the record of layer {layer}")
        (length,) = _LENGTH.unpack_from(content, position)
        end = start + length
        position = end + _PROBES_BYTES
        if position > len(content):
            raise ValueError(f"it ends within the record of layer {layer}")
        probes = torch.from_numpy(np.frombuffer(content, "<f4", NUMBER_OF_PROBES, end).astype(np.float32))
        if not torch.isfinite(probes).all():
            raise ValueError(f"the probes of layer {layer} are not finite")
        bases[layer] = LayerBasis(packed[start:end].cpu().clone(), probes)
    if position != len(content):
        raise ValueError(f"it has {len(content) - position} bytes after its last record")
    return bases
