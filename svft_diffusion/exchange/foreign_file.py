"""Reading safetensors files that other tools wrote: what they hold is checked before it is used."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svft_diffusion.errors import UserError
from svft_diffusion.files.adapter_file import METADATA_KEY
from svft_diffusion.files.container import check_container, one_line
from svft_diffusion.terminal import printable

# A LoRA of the largest model has some thousand tensors, with about 150 bytes of header each.
_LARGEST_HEADER = 8 * 2**20
_LONGEST_NAME = 512
_MOST_SIDES = 8
_DTYPES = frozenset(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL"))


@dataclass(frozen=True)
class ForeignFile:
    """Table of contents of a safetensors file; its tensors are read when they are asked for."""

    path: Path
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """The file's name, for messages."""
        return self.path.name

    @cached_property
    def _opened(self) -> Any:
        # Once: every opening parses the whole header again.
        return safe_open(self.path, framework="pt")

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors called ``names``, on the CPU; floating ones in float32 at least.

        Raises:
            UserError: the file can't be read, or a tensor holds NaN or infinity.
        """
        found = {}
        try:
            for name in names:
                tensor = self._opened.get_tensor(name)
                found[name] = tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
        except (SafetensorError, OSError) as problem:
            raise UserError(f"{self.path} is damaged: {printable(one_line(problem))}") from problem
        for name, tensor in found.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{self.name}: {name!r} holds NaN or infinite values; the training went wrong")
        return found


def open_foreign(path: str | os.PathLike[str]) -> ForeignFile:
    """Names, shapes and metadata of a file; no tensor is read, and nothing is ever unpickled.

    Raises:
        UserError: no such file, no safetensors file, damaged, empty, or an adapter of this product already.
    """
    path = Path(path)
    check_container(path, _LARGEST_HEADER)
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            entries = {name: opened.get_slice(name) for name in sorted(opened.keys())}
            shapes = {name: tuple(entry.get_shape()) for name, entry in entries.items()}
            dtypes = {name: str(entry.get_dtype()) for name, entry in entries.items()}
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{path} is damaged or no safetensors file: {printable(one_line(problem))}") from problem
    if METADATA_KEY in metadata:
        raise UserError(f"{path} is an svft_diffusion adapter already; load it as it is, there is nothing to import")
    if not shapes:
        raise UserError(f"{path} holds no tensors")
    for name, shape in shapes.items():
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise UserError(f"{path} has a tensor called {name[:100]!r}, as no adapter has")
        if len(shape) > _MOST_SIDES or dtypes[name] not in _DTYPES:
            raise UserError(f"{path}: {name!r} has {len(shape)} dimensions of type {dtypes[name]}, as no adapter has")
        if 0 in shape:
            raise UserError(f"{path}: {name!r} has no elements")
    return ForeignFile(path, metadata, shapes)
