"""One adapted linear layer, ``y = x (W + U M V^T)^T + b``, in the strategies that the planner chooses from.

All of them are exact, differentiable once, and save no more for backward than a low-rank adapter does. The gradient
reaches ``x``, ``b`` and the entries of the core; ``W``, ``U``, ``Sigma`` and ``V`` are frozen. Sizes: ``x`` (T, n),
``W`` (m, n), ``U`` (m, r), ``Vh = V^T`` (r, n).

* activation: ``x W^T + a M^T U^T + b`` with ``a = x V``, for any rank; saves ``a``.
* factors: ``a (Sigma + M)^T U^T + b`` at full rank, where ``W = U Sigma V^T``; reads no weight and saves ``a``.
* rebuilt: ``x W'^T + b`` with ``W' = W + U M V^T`` made once for each optimizer step; saves ``x``, which layers that
  read the same input (queries, keys, values) share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from svft_diffusion.kernels.call import Call, call_of, without_autocast
from svft_diffusion.kernels.compression import KeptActivation, keep
from svft_diffusion.kernels.core_products import (
    core_gradient,
    core_into_smaller,
    gradient_through_weight,
    shifted_spectrum,
)
from svft_diffusion.kernels.planner import Strategy, sampling_is_cheaper
from svft_diffusion.spectral.core import Core


def adapted_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    U: Tensor,
    S: Tensor | None,
    Vh: Tensor,
    core: Core,
    *,
    strategy: Strategy,
    rebuilt: Tensor | None = None,
    compress: bool = False,
) -> Tensor:
    """``y`` (..., m) of an adapted linear layer, in the dtype that `torch.nn.functional.linear` would give.

    Args:
        x: (..., n).
        weight: the frozen ``W`` (m, n); read by "activation" only.
        bias: (m,) of any floating dtype, or None.
        U: (m, r), best in the dtype of the computation: other dtypes are cast at every call.
        S: (r,) float32; read by "factors" only.
        Vh: (r, n), as ``U``.
        core: ``M`` with float32 entries, not batched.
        strategy: see the module; `plan_linear` finds the cheapest.
        rebuilt: ``W'`` of `rebuild_weight` for this very core; read by "rebuilt" only.
        compress: keep what is saved for backward in eight bits.

    Raises:
        ValueError: shapes don't fit, or what the strategy reads is missing.
    """
    check_operands(strategy, weight, U, S, Vh, core, rebuilt)
    if x.shape[-1] != Vh.shape[1]:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit Vh of shape {tuple(Vh.shape)}")
    call = call_of(x, bias, core.dense, compress)
    with without_autocast(x.device):
        if strategy == "rebuilt":
            y = _Rebuilt.apply(x, bias, core.entries, rebuilt, U, Vh, call)
        elif strategy == "factors":
            y = _Factors.apply(x, bias, core.entries, U, S, Vh, call)
        else:
            y = _Activation.apply(x, bias, core.entries, weight, U, Vh, call)
    # Out here: what a Function returns as a view, nobody may change in place (`hidden_states += residual`).
    return y.view(*x.shape[:-1], U.shape[0])


@torch.no_grad()
def rebuild_weight(weight: Tensor, U: Tensor, core: Core, Vh: Tensor) -> Tensor:
    """``W' = W + U M V^T`` in the shape and dtype of ``weight`` (m, ...), computed in float32 or wider."""
    with without_autocast(weight.device):
        wide = torch.promote_types(core.entries.dtype, weight.dtype)
        left, right = core_into_smaller(U.to(wide), core, Vh.to(wide))
        return torch.addmm(weight.flatten(1).to(wide), left, right).to(weight.dtype).view(weight.shape)


def check_operands(
    strategy: Strategy,
    weight: Tensor | None,
    U: Tensor,
    S: Tensor | None,
    Vh: Tensor,
    core: Core,
    rebuilt: Tensor | None,
) -> None:
    """Raises ValueError unless the shapes fit each other and the strategy has what it reads."""
    m, n, rank = U.shape[0], Vh.shape[1], core.rank
    if core.batched:
        raise ValueError("a batch of cores has no fast path: apply each sample's core to its own rows")
    if U.shape[1] != rank or Vh.shape[0] != rank:
        raise ValueError(f"a core of rank {rank} does not fit U {tuple(U.shape)} and Vh {tuple(Vh.shape)}")
    if strategy == "factors":
        if rank != min(m, n):
            raise ValueError(f"strategy 'factors' needs all {min(m, n)} singular triplets, got {rank}")
        if S is None or S.shape != (rank,):
            raise ValueError(f"strategy 'factors' needs {rank} singular values")
    elif strategy == "activation":
        _check_weight("weight", weight, m, n)
    elif strategy == "rebuilt":
        _check_weight("rebuilt", rebuilt, m, n)
    else:
        raise ValueError(f"unknown strategy {strategy!r}")


def _check_weight(name: str, weight: Tensor | None, m: int, n: int) -> None:
    if weight is None:
        raise ValueError(f"this strategy needs `{name}`")
    if weight.shape[0] != m or weight.numel() != m * n:
        raise ValueError(f"`{name}` of shape {tuple(weight.shape)} does not fit factors of a {m} x {n} matrix")


class _Factors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, entries: Tensor, U: Tensor, S: Tensor, Vh: Tensor, call: Call
    ) -> Tensor:
        ctx.call, dtype = call, call.dtype
        a = functional.linear(_rows(x, dtype), Vh.to(dtype))
        spectrum = shifted_spectrum(S, Core(entries, call.dense))
        left, right = core_into_smaller(a, spectrum, U.to(dtype).mT, transposed=True)
        y = functional.linear(left, right.mT, None if bias is None else bias.to(dtype))
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
            rows, core = _rows(g, call.dtype), Core(entries, call.dense)
            gx = gradient = None
            if x_needs or core_needs:
                b = rows @ U.to(call.dtype)
            if core_needs:
                gradient = core_gradient(KeptActivation(*kept), b, core)
            if x_needs:
                left, right = core_into_smaller(b, shifted_spectrum(S, core), Vh.to(call.dtype))
                gx = call.input_gradient(left @ right)
            return gx, call.bias_gradient(rows, 0) if bias_needs else None, gradient, *[None] * 4


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, entries: Tensor, weight: Tensor, U: Tensor, Vh: Tensor, call: Call
    ) -> Tensor:
        ctx.call, dtype = call, call.dtype
        rows = _rows(x, dtype)
        a = functional.linear(rows, Vh.to(dtype))
        y = functional.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        y = y.addmm_(*core_into_smaller(a, Core(entries, call.dense), U.to(dtype).mT, transposed=True))
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
            rows, core = _rows(g, call.dtype), Core(entries, call.dense)
            gx = gradient = None
            if x_needs or core_needs:
                b = rows @ U.to(call.dtype)
            if core_needs:
                gradient = core_gradient(KeptActivation(*kept), b, core)
            if x_needs:
                left, right = core_into_smaller(b, core, Vh.to(call.dtype))
                gx = call.input_gradient((rows @ weight.to(call.dtype)).addmm_(left, right))
            return gx, call.bias_gradient(rows, 0) if bias_needs else None, gradient, *[None] * 4


class _Rebuilt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, entries: Tensor, rebuilt: Tensor, U: Tensor, Vh: Tensor, call: Call
    ) -> Tensor:
        ctx.call, dtype = call, call.dtype
        rows = _rows(x, dtype)
        y = functional.linear(rows, rebuilt.to(dtype), None if bias is None else bias.to(dtype))
        kept: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[2]:
            # `x` itself where it can be: rows that had to be copied would not be shared with other layers.
            kept = keep(rows, compress=True).tensors if call.compress else (x if x.dtype == dtype else rows,)
        ctx.save_for_backward(entries, rebuilt, U, Vh, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        x_needs, bias_needs, core_needs = ctx.needs_input_grad[:3]
        entries, rebuilt, U, Vh, *kept = ctx.saved_tensors
        with without_autocast(g.device):
            rows = _rows(g, call.dtype)
            gx = gradient = None
            if core_needs:
                x = KeptActivation(_rows(kept[0], kept[0].dtype), *kept[1:])
                core = Core(entries, call.dense)
                gradient = _gradient_from_input(x, rows, U.to(call.dtype), Vh.to(call.dtype), core)
            if x_needs:
                gx = call.input_gradient(rows @ rebuilt.to(call.dtype))
            return gx, call.bias_gradient(rows, 0) if bias_needs else None, gradient, *[None] * 4


def _gradient_from_input(x: KeptActivation, g: Tensor, U: Tensor, Vh: Tensor, core: Core) -> Tensor:
    """Gradient of the core's entries from ``x`` (T, n) and ``g`` (T, m), through ``g^T x`` or row by row."""
    (tokens, m), n = g.shape, Vh.shape[1]
    if sampling_is_cheaper(m, n, core.rank, tokens):
        a = functional.linear(x.restored(g.dtype), Vh)
        return core_gradient(KeptActivation(a), g @ U, core)
    return gradient_through_weight(g.mT @ x.restored(g.dtype), U, Vh, core)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, n) of a tensor (..., n)."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(dtype)
