"""One entry of the cache: the factors of one weight in one file.

An entry is ``U``, ``S`` and ``Vh`` (float32, row-major, the machine's byte order), each padded with zeros to a
multiple of 64 bytes, and a last word with the CRC-32 of the key and of all that comes before. It needs no header: the
key is the file's name, and the weight at hand gives the shapes. Every factor so begins at a multiple of 64 bytes in
the file and in memory, as PyTorch's own tensors do; the last bits of a product may depend on that.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from svft_diffusion.spectral import ALGORITHM_VERSION, SingularFactors

ENTRY_SUFFIX = ".factors"
_ALIGNMENT = 16  # float32 words in 64 bytes


class DamagedEntry(Exception):
    """The file is not what was written under its key."""


def entry_key(weight: Tensor) -> str:
    """Key of the factors of a matrix ``W`` (m, n): a SHA-256 of its shape, its values and the algorithm's version.

    Values count, not how they are stored: a float16 checkpoint has the same key when it was loaded in float32.

    Raises:
        ValueError: the weight is no matrix of numbers.
    """
    if weight.ndim != 2:
        raise ValueError(f"expected a matrix, got a tensor of shape {tuple(weight.shape)}")
    if weight.numel() == 0:
        raise ValueError(f"the weight is empty, its shape is {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError("the weight has no values yet (it lies on the meta device)")
    if not weight.is_floating_point():
        raise ValueError(f"the weight is quantized or not real ({weight.dtype}); load the model unquantized")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    values = weight.detach().to(device="cpu", dtype=dtype).reshape(-1)
    rows, columns = weight.shape
    key = hashlib.sha256(f"{ALGORITHM_VERSION}|{dtype}|{rows}x{columns}|".encode())
    key.update(values.numpy().data)
    return key.hexdigest()


def pack_factors(factors: SingularFactors, key: str) -> Tensor:
    """The content of an entry as one vector of float32 words."""
    shape = (factors.U.shape[0], factors.Vh.shape[1])
    content = torch.zeros(_number_of_words(shape), dtype=torch.float32)
    for part, factor in zip(unpack_factors(content, shape), factors, strict=True):
        part.copy_(factor)
    content[-1:].view(torch.int32).fill_(_checksum(content, key))
    return content


def unpack_factors(content: Tensor, shape: tuple[int, int]) -> SingularFactors:
    """Views of the factors in an entry's ``content``; ``shape`` (m, n) is the weight's."""
    parts = []
    start = 0
    for part_shape in _factor_shapes(shape):
        size = math.prod(part_shape)
        parts.append(content[start : start + size].view(part_shape))
        start += _padded(size)
    return SingularFactors(*parts)


def map_entry(file: Path, shape: tuple[int, int], key: str) -> SingularFactors:
    """The factors in an entry, mapped into memory: processes share the pages, and a change in place stays private.

    Raises:
        OSError: the file can't be read; FileNotFoundError where there is none.
        DamagedEntry: it does not hold what was written under ``key``.
    """
    words = _number_of_words(shape)
    size = file.stat().st_size
    if size != 4 * words:
        raise DamagedEntry(f"{size} bytes instead of {4 * words}")
    try:
        content = torch.from_file(str(file), shared=False, size=words, dtype=torch.float32)
    except RuntimeError as problem:  # what PyTorch raises for any failure of the system
        raise OSError(str(problem)) from problem
    if int(content[-1:].view(torch.int32)) != _checksum(content, key):
        raise DamagedEntry("its checksum does not fit")
    return unpack_factors(content, shape)


def _factor_shapes(shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    rows, columns = shape
    kept = min(shape)
    return (rows, kept), (kept,), (kept, columns)


def _padded(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def _number_of_words(shape: tuple[int, int]) -> int:
    return sum(_padded(math.prod(part)) for part in _factor_shapes(shape)) + 1


def _checksum(content: Tensor, key: str) -> int:
    """CRC-32 of the key and of all words but the last, as a signed word."""
    # No cryptographic hash: damage is chance, and reading gigabytes of factors should cost less than hashing them.
    checksum = zlib.crc32(content[:-1].numpy().data, zlib.crc32(key.encode()))
    return checksum - 2**32 if checksum >= 2**31 else checksum
