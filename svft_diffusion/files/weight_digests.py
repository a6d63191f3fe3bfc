"""Digests of the base weights that an adapter changes: which of them are those of the training?

Of each weight three short digests are kept: as it was stored, and of its values cast to float16 and to bfloat16. So the
same weights are recognised in another dtype, in another file or layout of files, and one by one: a base of which only
the text encoder was tuned further still has the UNet of the training.

A digest is the first 6 bytes of a SHA-256 over dtype, shape and the elements' bytes. A bfloat16 weight has lost the
bits that its float16 digest would be made of; weights that hold more bits than float16 have all three.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svft_diffusion.files.container import tensor_bytes

_DIGEST_BYTES = 6  # two weights of one model share a digest by chance once in 10^14 pairs
_FINGERPRINT_LENGTH = 32
_16_BIT = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class WeightDigest(NamedTuple):
    """The digests of one weight; None where the weight has not the bits for it."""

    stored: bytes
    float16: bytes | None
    bfloat16: bytes


class BaseDigests(NamedTuple):
    """The digests of all adapted weights of a base, in the order of the layers' canonical names."""

    stored: tuple[bytes, ...] = ()
    float16: tuple[bytes, ...] | None = None  # None where a weight is in bfloat16
    bfloat16: tuple[bytes, ...] = ()

    @property
    def fingerprint(self) -> str:
        """One short text for the whole base: ``float16:<hash> bfloat16:<hash>``, or the second part alone.

        The same weights in another precision share a part.
        """
        parts = {"float16": self.float16, "bfloat16": self.bfloat16}
        return " ".join(
            f"{name}:{hashlib.sha256(b''.join(digests)).hexdigest()[:_FINGERPRINT_LENGTH]}"
            for name, digests in parts.items()
            if digests
        )

    def to_json(self) -> dict[str, str]:
        """The digests as base64 text, those of one kind one after the other."""
        parts = {"stored": self.stored, "float16": self.float16, "bfloat16": self.bfloat16}
        return {
            name: base64.b64encode(b"".join(digests)).decode() for name, digests in parts.items() if digests is not None
        }


class Matches(NamedTuple):
    """How many of the adapted weights of a base are those of the training."""

    matched: int
    rounded: int  # of those, how many agree only when they are rounded to 16 bit
    total: int

    @property
    def all(self) -> bool:
        """Whether every weight is that of the training, rounded or not."""
        return self.matched == self.total

    def __str__(self) -> str:
        return f"{self.matched} of {self.total} adapted weights are those of the training"


def digests_from_json(fields: Mapping[str, Any]) -> BaseDigests:
    """What `BaseDigests.to_json` gave.

    Raises:
        ValueError: it is something else.
    """
    parts = {name: _split(fields[name]) for name in ("stored", "float16", "bfloat16") if name in fields}
    if "stored" not in parts or "bfloat16" not in parts or len({len(part) for part in parts.values()}) != 1:
        raise ValueError("the digests of the base do not go together")
    return BaseDigests(parts["stored"], parts.get("float16"), parts["bfloat16"])


def digest_of_weight(weight: Tensor) -> WeightDigest:
    """All digests of one weight."""
    lossy = weight.dtype == torch.bfloat16
    return WeightDigest(
        _digest(weight), None if lossy else _digest(weight.to(torch.float16)), _digest(weight.to(torch.bfloat16))
    )


def digests_of_base(weights: Sequence[WeightDigest]) -> BaseDigests:
    """The digests of a base from those of its adapted weights, in the order of the layers' canonical names."""
    float16 = [digest.float16 for digest in weights if digest.float16 is not None]
    return BaseDigests(
        tuple(digest.stored for digest in weights),
        tuple(float16) if len(float16) == len(weights) else None,
        tuple(digest.bfloat16 for digest in weights),
    )


def agreement(weight: Tensor, trained: BaseDigests, position: int) -> str | None:
    """``exact`` if a weight is that of the training, ``rounded`` if it agrees when both are in 16 bit, else None.

    No more is hashed than it takes to know.
    """
    if position >= len(trained.stored):
        return None
    if _digest(weight) == trained.stored[position]:
        return "exact"
    if weight.itemsize == 2 and _digest(weight.float()) == trained.stored[position]:
        return "exact"  # a 16-bit checkpoint that was loaded in float32 holds the same numbers
    for name, dtype in _16_BIT.items():
        digests: tuple[bytes, ...] | None = getattr(trained, name)
        # From bfloat16 there is no way back to the float16 values.
        if digests is None or (weight.dtype == torch.bfloat16 and dtype == torch.float16):
            continue
        if _digest(weight.to(dtype)) == digests[position]:
            return "rounded"
    return None


def agreement_of_digests(own: WeightDigest, trained: BaseDigests, position: int) -> str | None:
    """`agreement` of a weight of which only the digests are left."""
    if position >= len(trained.stored):
        return None
    if own.stored == trained.stored[position]:
        return "exact"
    same_float16 = own.float16 is not None and trained.float16 is not None and own.float16 == trained.float16[position]
    return "rounded" if same_float16 or own.bfloat16 == trained.bfloat16[position] else None


def _digest(weight: Tensor) -> bytes:
    digest = hashlib.sha256(f"{weight.dtype}|{tuple(weight.shape)}|".encode())
    digest.update(tensor_bytes(weight))
    return digest.digest()[:_DIGEST_BYTES]


def _split(text: object) -> tuple[bytes, ...]:
    if not isinstance(text, str):
        raise ValueError("a digest of the base is not text")
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as problem:
        raise ValueError(f"a digest of the base is not base64: {problem}") from problem
    if len(content) % _DIGEST_BYTES:
        raise ValueError("a digest of the base is cut short")
    return tuple(content[start : start + _DIGEST_BYTES] for start in range(0, len(content), _DIGEST_BYTES))
