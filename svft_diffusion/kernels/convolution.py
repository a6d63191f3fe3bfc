"""One adapted convolution in the strategies of `adapted_linear`; its weight as a matrix is (c_out, c_in * kernel size).

``V^T`` is a convolution with ``r`` filters and the layer's stride, padding and dilation, ``U`` one with kernels of size
one. No gradient of a frozen kernel is ever computed: PyTorch's own backward does so on a CPU when a bias trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from svft_diffusion.kernels.call import Call, call_of, without_autocast
from svft_diffusion.kernels.compression import KeptActivation, keep, parts_of
from svft_diffusion.kernels.core_products import core_gradient, gradient_through_weight, shifted_spectrum, times_core
from svft_diffusion.kernels.linear import check_operands
from svft_diffusion.kernels.planner import Strategy, sampling_is_cheaper
from svft_diffusion.spectral.core import Core


class _Geometry(NamedTuple):
    """How a kernel moves over its input; one number for each spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def adapted_convolution(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    U: Tensor,
    S: Tensor | None,
    Vh: Tensor,
    core: Core,
    *,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    strategy: Strategy,
    rebuilt: Tensor | None = None,
    compress: bool = False,
) -> Tensor:
    """Output of an adapted convolution in one to three dimensions, of one group and padded with zeros.

    Args:
        x: (B, c_in, *space) or (c_in, *space).
        weight: the frozen kernel (c_out, c_in, *kernel_size); read by "activation" only.
        bias: (c_out,) of any floating dtype, or None.
        U: (c_out, r).
        S: (r,) float32; read by "factors" only.
        Vh: (r, c_in * product of kernel_size).
        core: ``M`` with float32 entries, not batched.
        kernel_size: one number for each spatial dimension.
        stride: as for `torch.nn.Conv2d`.
        padding: numbers, "same" or "valid" as for `torch.nn.Conv2d`. For other modes than zeros, pad ``x`` before.
        dilation: as for `torch.nn.Conv2d`.
        strategy: `plan_convolution` finds the cheapest.
        rebuilt: ``W'`` of `rebuild_weight` for this very core, in the shape of ``weight``; read by "rebuilt" only.
        compress: keep what is saved for backward in eight bits.

    Raises:
        ValueError: shapes don't fit, what the strategy reads is missing, or padding "same" meets a stride.
    """
    check_operands(strategy, weight, U, S, Vh, core, rebuilt)
    if x.ndim == len(kernel_size) + 1:
        batch = adapted_convolution(
            x[None], weight, bias, U, S, Vh, core, kernel_size=kernel_size, stride=stride, padding=padding,
            dilation=dilation, strategy=strategy, rebuilt=rebuilt, compress=compress,
        )  # fmt: skip
        return batch[0]
    if x.ndim != len(kernel_size) + 2 or x.shape[1] * math.prod(kernel_size) != Vh.shape[1]:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit a kernel {tuple(kernel_size)} and Vh {Vh.shape[1]}")
    geometry, uneven = _geometry(kernel_size, stride, padding, dilation)
    if any(uneven):
        x = functional.pad(x, uneven)
    call = call_of(x, bias, core.dense, compress)
    with without_autocast(x.device):
        if strategy == "rebuilt":
            return _Rebuilt.apply(x, bias, core.entries, rebuilt, U, Vh, geometry, call)
        if strategy == "factors":
            return _Factors.apply(x, bias, core.entries, U, S, Vh, geometry, call)
        return _Activation.apply(x, bias, core.entries, weight, U, Vh, geometry, call)


class _Factors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        entries: Tensor,
        U: Tensor,
        S: Tensor,
        Vh: Tensor,
        geometry: _Geometry,
        call: Call,
    ) -> Tensor:
        ctx.call, ctx.geometry, dtype = call, geometry, call.dtype
        a = _convolve(x.to(dtype), _filters(Vh.to(dtype), geometry), None, geometry)
        y = _through_core(a, U.to(dtype), shifted_spectrum(S, Core(entries, call.dense)), bias)
        kept = keep(a, compress=call.compress).tensors if ctx.needs_input_grad[2] else ()
        ctx.save_for_backward(entries, U, S, Vh, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        x_needs, bias_needs, core_needs = ctx.needs_input_grad[:3]
        entries, U, S, Vh, *kept = ctx.saved_tensors
        with without_autocast(g.device):
            core = Core(entries, call.dense)
            gx = gradient = None
            if x_needs or core_needs:
                b = _pointwise(g, U.to(call.dtype).mT)
            if core_needs:
                gradient = _core_gradient(KeptActivation(*kept), b, core)
            if x_needs:
                spectrum = shifted_spectrum(S, core)
                gx = call.input_gradient(_back_through_core(b, spectrum, Vh.to(call.dtype), ctx.geometry, call.x_shape))
            return gx, _bias_gradient(call, g) if bias_needs else None, gradient, *[None] * 5


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        entries: Tensor,
        weight: Tensor,
        U: Tensor,
        Vh: Tensor,
        geometry: _Geometry,
        call: Call,
    ) -> Tensor:
        ctx.call, ctx.geometry, dtype = call, geometry, call.dtype
        x = x.to(dtype)
        a = _convolve(x, _filters(Vh.to(dtype), geometry), None, geometry)
        y = _convolve(x, weight.to(dtype), bias, geometry)
        y += _through_core(a, U.to(dtype), Core(entries, call.dense), None)
        kept = keep(a, compress=call.compress).tensors if ctx.needs_input_grad[2] else ()
        ctx.save_for_backward(entries, weight, U, Vh, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        x_needs, bias_needs, core_needs = ctx.needs_input_grad[:3]
        entries, weight, U, Vh, *kept = ctx.saved_tensors
        with without_autocast(g.device):
            core = Core(entries, call.dense)
            gx = gradient = None
            if x_needs or core_needs:
                b = _pointwise(g, U.to(call.dtype).mT)
            if core_needs:
                gradient = _core_gradient(KeptActivation(*kept), b, core)
            if x_needs:
                update = _back_through_core(b, core, Vh.to(call.dtype), ctx.geometry, call.x_shape)
                update += _input_gradient(g, weight.to(call.dtype), ctx.geometry, call.x_shape)
                gx = call.input_gradient(update)
            return gx, _bias_gradient(call, g) if bias_needs else None, gradient, *[None] * 5


class _Rebuilt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        entries: Tensor,
        rebuilt: Tensor,
        U: Tensor,
        Vh: Tensor,
        geometry: _Geometry,
        call: Call,
    ) -> Tensor:
        ctx.call, ctx.geometry, dtype = call, geometry, call.dtype
        x = x.to(dtype)
        y = _convolve(x, rebuilt.to(dtype), bias, geometry)
        kept = keep(x, compress=call.compress).tensors if ctx.needs_input_grad[2] else ()
        ctx.save_for_backward(entries, rebuilt, U, Vh, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        x_needs, bias_needs, core_needs = ctx.needs_input_grad[:3]
        entries, rebuilt, U, Vh, *kept = ctx.saved_tensors
        with without_autocast(g.device):
            gx = gradient = None
            if core_needs:
                x, core = KeptActivation(*kept).restored(call.dtype), Core(entries, call.dense)
                gradient = _gradient_from_input(x, g, U.to(call.dtype), Vh.to(call.dtype), core, ctx.geometry)
            if x_needs:
                gx = call.input_gradient(_input_gradient(g, rebuilt.to(call.dtype), ctx.geometry, call.x_shape))
            return gx, _bias_gradient(call, g) if bias_needs else None, gradient, *[None] * 5


def _through_core(a: Tensor, U: Tensor, core: Core, bias: Tensor | None) -> Tensor:
    """``U M`` on the channels of ``a`` (B, r, *space), plus the bias; ``M`` joins the smaller of ``U`` and ``a``."""
    if _positions(a) < U.shape[0]:
        return _pointwise(_core_on_channels(a, core, transposed=True), U, bias)
    return _pointwise(a, times_core(U, core), bias)


def _back_through_core(b: Tensor, core: Core, Vh: Tensor, geometry: _Geometry, shape: torch.Size) -> Tensor:
    """``V M^T`` on the channels of ``b`` (B, r, *space), moved back to an input of this shape."""
    if _positions(b) < Vh.shape[1]:
        b = _core_on_channels(b, core, transposed=False)
    else:
        Vh = times_core(Vh.mT, core, transposed=True).mT
    return _input_gradient(b, _filters(Vh, geometry), geometry, shape)


def _core_on_channels(z: Tensor, core: Core, *, transposed: bool) -> Tensor:
    rows = times_core(_rows_of_channels(z), core, transposed=transposed)
    return rows.view(z.shape[0], *z.shape[2:], z.shape[1]).movedim(-1, 1)


def _core_gradient(a: KeptActivation, b: Tensor, core: Core) -> Tensor:
    """Gradient of the core's entries from activations (B, r, *space)."""
    gradient = torch.zeros_like(core.entries)
    for samples in parts_of(b):
        rows = [_rows_of_channels(tensor) for tensor in a[samples].tensors]
        gradient += core_gradient(KeptActivation(*rows), _rows_of_channels(b[samples]), core)
    return gradient


def _gradient_from_input(x: Tensor, g: Tensor, U: Tensor, Vh: Tensor, core: Core, geometry: _Geometry) -> Tensor:
    """Gradient of the core's entries from the input and the output's gradient, whichever way takes less."""
    if sampling_is_cheaper(U.shape[0], Vh.shape[1], core.rank, _positions(g)):
        a = _convolve(x, _filters(Vh, geometry), None, geometry)
        return _core_gradient(KeptActivation(a), _pointwise(g, U.mT), core)
    G = _kernel_gradient(g, x, U.shape[0], geometry)
    return gradient_through_weight(G.flatten(1), U, Vh, core)


def _bias_gradient(call: Call, g: Tensor) -> Tensor:
    return call.bias_gradient(g, [0, *range(2, g.ndim)])


def _rows_of_channels(z: Tensor) -> Tensor:
    """(B * positions, r) of a tensor (B, r, *space); of one sample, a view."""
    return z.flatten(2).transpose(1, 2).flatten(0, 1)


def _positions(z: Tensor) -> int:
    return z.shape[0] * z.shape[2:].numel()


def _filters(Vh: Tensor, geometry: _Geometry) -> Tensor:
    """(r, c_in, *kernel) of ``Vh`` (r, c_in * kernel size)."""
    return Vh.reshape(Vh.shape[0], -1, *geometry.kernel)


def _pointwise(z: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """A matrix (p, r) on the channels of ``z`` (B, r, *space), plus a bias (p,)."""
    ones = (1,) * (z.ndim - 2)
    return _convolve(z, matrix.reshape(*matrix.shape, *ones), bias, _Geometry(ones, ones, (0,) * len(ones), ones))


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    none = [0] * len(geometry.kernel)
    return torch.convolution(x, kernel, bias, geometry.stride, geometry.padding, geometry.dilation, False, none, 1)


def _input_gradient(g: Tensor, kernel: Tensor, geometry: _Geometry, shape: torch.Size) -> Tensor:
    """Gradient (B, c_in, *space) of the input of a convolution from that of its output."""
    # Of the input only the shape is read.
    x = g.new_empty(1).expand(shape)
    return _backward(g, x, kernel, geometry, [True, False, False])[0]


def _kernel_gradient(g: Tensor, x: Tensor, c_out: int, geometry: _Geometry) -> Tensor:
    """Gradient (c_out, c_in, *kernel) of the kernel of a convolution from that of its output."""
    kernel = g.new_empty(1).expand(c_out, x.shape[1], *geometry.kernel)
    return _backward(g, x, kernel, geometry, [False, True, False])[1]


def _backward(g: Tensor, x: Tensor, kernel: Tensor, geometry: _Geometry, wanted: list[bool]) -> tuple[Tensor, ...]:
    none = [0] * len(geometry.kernel)
    return torch.ops.aten.convolution_backward(
        g, x, kernel, None, geometry.stride, geometry.padding, geometry.dilation, False, none, 1, wanted
    )


def _geometry(
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
) -> tuple[_Geometry, list[int]]:
    """The geometry in numbers, and what is to be padded before: kernels of even extent need one more on the right."""
    kernel = tuple(kernel_size)
    steps, spread = _for_each(stride, kernel), _for_each(dilation, kernel)
    uneven = [0] * (2 * len(kernel))
    if padding == "same":
        if any(step != 1 for step in steps):
            raise ValueError("padding 'same' needs stride 1")
        missing = [distance * (size - 1) for distance, size in zip(spread, kernel, strict=True)]
        uneven[1::2] = [total % 2 for total in reversed(missing)]
        padding = [total // 2 for total in missing]
    elif padding == "valid":
        padding = 0
    elif isinstance(padding, str):
        raise ValueError(f"unknown padding {padding!r}; choose numbers, 'same' or 'valid'")
    return _Geometry(kernel, steps, _for_each(padding, kernel), spread), uneven


def _for_each(number: int | Sequence[int], kernel: tuple[int, ...]) -> tuple[int, ...]:
    return (number,) * len(kernel) if isinstance(number, int) else tuple(number)
