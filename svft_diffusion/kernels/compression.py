"""Activations that wait for the backward pass, as they are or in eight bits.

Eight bits with one scale a row take a quarter of the bytes of float32. A gradient of a core that is computed from them
is off by 0.3 to 0.8 %, far less than two minibatches differ; the gradient of the layer's input doesn't use them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_CODE = 127
# Elements that one step of a loop over rows touches. On a CPU they should stay in its cache; elsewhere each step costs
# the start of several kernels, so that the bound only keeps temporaries small against what is saved anyway.
_ELEMENTS_AT_ONCE_CPU = 1 << 17
_ELEMENTS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class KeptActivation:
    """Rows (T, r), or channels first (B, r, ...): the ``values``, or int8 codes and the float32 ``scale`` of each row.

    The scale has the shape of ``values`` with 1 in place of ``r``.
    """

    values: Tensor
    scale: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a `torch.autograd.Function` saves; ``KeptActivation(*tensors)`` is the activation again."""
        return (self.values,) if self.scale is None else (self.values, self.scale)

    def __getitem__(self, part: slice) -> KeptActivation:
        """A part of the leading dimension, without a copy."""
        return KeptActivation(self.values[part], None if self.scale is None else self.scale[part])

    def restored(self, dtype: torch.dtype) -> Tensor:
        """The activation in ``dtype``."""
        return self.values.to(dtype) if self.scale is None else self.values.float().mul_(self.scale).to(dtype)


def keep(activation: Tensor, *, compress: bool) -> KeptActivation:
    """The activation for the backward pass, (T, r) or (B, r, ...); with ``compress`` in eight bits."""
    if not compress:
        return KeptActivation(activation)
    codes = torch.empty_like(activation, dtype=torch.int8)
    scale = torch.empty_like(activation[:, :1], dtype=torch.float32)
    for part in parts_of(activation):
        values = activation[part].float()
        largest = values.abs().amax(dim=1, keepdim=True)
        # A row of zeros has no scale: with 1 its codes are zeros too.
        scale[part] = torch.where(largest == 0, 1.0, largest / _LARGEST_CODE)
        codes[part] = (values / scale[part]).round_()
    return KeptActivation(codes, scale)


def parts_of(activation: Tensor) -> Iterator[slice]:
    """Slices of the leading dimension, each of few enough elements for a temporary of its size."""
    length = activation.shape[0]
    elements = _ELEMENTS_AT_ONCE_CPU if activation.device.type == "cpu" else _ELEMENTS_AT_ONCE
    step = max(1, elements * length // max(1, activation.numel()))
    for first in range(0, length, step):
        yield slice(first, min(first + step, length))
