"""How one call of a kernel computes: its dtype, which is that of the layer it stands for, and what it keeps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """What the backward pass has to know of the forward pass beside its tensors."""

    dtype: torch.dtype  # of the matrix products and of the output
    dense: bool  # the entries are a dense core
    compress: bool  # what is kept for backward is kept in eight bits
    x_shape: torch.Size
    x_dtype: torch.dtype
    bias_dtype: torch.dtype | None

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of ``x``, in its shape and dtype."""
        return gradient.to(self.x_dtype).view(self.x_shape)

    def bias_gradient(self, g: Tensor, dim: int | list[int]) -> Tensor:
        """The gradient of the bias: ``g`` summed over ``dim``, in float32 or wider."""
        return g.sum(dim, dtype=torch.promote_types(torch.float32, g.dtype)).to(self.bias_dtype)


def call_of(x: Tensor, bias: Tensor | None, dense: bool, compress: bool) -> Call:
    """The call of a kernel with these arguments, under the present autocast and gradient modes."""
    return Call(
        dtype=compute_dtype(x),
        dense=dense,
        compress=compress and torch.is_grad_enabled(),
        x_shape=x.shape,
        x_dtype=x.dtype,
        bias_dtype=None if bias is None else bias.dtype,
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `torch.nn.functional.linear` would compute with ``x``: autocast's, or that of ``x``."""
    if _autocasts(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """No autocast within: kernels cast by hand, so that cores stay float32 until they are folded into a factor."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else nullcontext()


def _autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
