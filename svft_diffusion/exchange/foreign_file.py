"""Reading safetensors files that other tools wrote: what they hold is checked before it is used."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svft_diffusion.errors import UserError
from svft_diffusion.files.adapter_file import METADATA_KEY, check_container


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

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors called ``names``, on the CPU; floating ones in float32 at least.

        Raises:
            UserError: the file can't be read, or a tensor holds NaN, infinity or complex numbers.
        """
        found = {}
        try:
            with safe_open(self.path, framework="pt") as opened:
                for name in names:
                    tensor = opened.get_tensor(name)
                    found[name] = tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
        except (SafetensorError, OSError) as problem:
            raise UserError(f"{self.path} is damaged: {problem}") from problem
        for name, tensor in found.items():
            if tensor.is_complex():
                raise UserError(f"{self.name}: {name!r} holds complex numbers, which no adapter has")
            if not torch.isfinite(tensor).all():
                raise UserError(f"{self.name}: {name!r} holds NaN or infinite values; the training went wrong")
        return found


def open_foreign(path: str | os.PathLike[str]) -> ForeignFile:
    """Names, shapes and metadata of a file; no tensor is read, and nothing is ever unpickled.

    Raises:
        UserError: no such file, no safetensors file, damaged, empty, or an adapter of this product already.
    """
    path = Path(path)
    check_container(path)
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in sorted(opened.keys())}
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{path} is damaged or no safetensors file: {problem}") from problem
    if METADATA_KEY in metadata:
        raise UserError(f"{path} is an svft_diffusion adapter already; load it as it is, there is nothing to import")
    if not shapes:
        raise UserError(f"{path} holds no tensors")
    for name, shape in shapes.items():
        if 0 in shape:
            raise UserError(f"{path}: {name!r} has no elements")
    return ForeignFile(path, metadata, shapes)
