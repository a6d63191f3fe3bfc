"""Which adapters a picture carries, so that whoever gets it can load it like an adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.errors import UserError
from svft_diffusion.files.carrier import file_of_adapter
from svft_diffusion.sampling.adapter_choice import CheckedAdapter

LARGEST_UNASKED = 1_000_000
"""Bytes of an adapter that goes into pictures without being asked for."""


def adapters_to_embed(adapters: Sequence[CheckedAdapter], embed: bool | None) -> dict[str, bytes]:
    """Name -> file of each adapter that the pictures it makes shall carry.

    Args:
        embed: every adapter, none, or (None) those of at most `LARGEST_UNASKED` bytes.

    Raises:
        UserError: a file can't be read any more, or was changed since it was checked.
    """
    if embed is False:
        return {}
    contents = {}
    for adapter in adapters:
        content = file_of_adapter(adapter.file)
        if hashlib.sha256(content).hexdigest() != adapter.sha256:
            raise UserError(f"{adapter.file} has changed while it was in use; start again")
        if embed or len(content) <= LARGEST_UNASKED:
            contents[adapter.name] = content
    return contents


def embedded_in_picture(contents: Mapping[str, bytes], weights: Mapping[str, AdapterWeight]) -> list[bytes]:
    """The files that a picture made at ``weights`` carries: each once, and none of those that did not act."""
    return list(dict.fromkeys(contents[name] for name, weight in weights.items() if _acts(weight) and name in contents))


def _acts(weight: AdapterWeight) -> bool:
    return any(_acts(part) for part in weight.values()) if isinstance(weight, Mapping) else weight != 0
