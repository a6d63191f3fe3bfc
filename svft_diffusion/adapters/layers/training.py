"""How a layer computes while its adapters train: the cheapest exact strategy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.layers import computing
from svft_diffusion.adapters.layers.formula import Inputs
from svft_diffusion.adapters.layers.kinds import Kind, along_features, has_plain_forward, matrix_of
from svft_diffusion.adapters.layers.parking import Parking
from svft_diffusion.adapters.layers.placement import PlacedFactors, identity
from svft_diffusion.adapters.methods import Term, Triplets, combined_core
from svft_diffusion.kernels import (
    Strategy,
    adapted_convolution,
    adapted_linear,
    plan_convolution,
    plan_linear,
    rebuild_weight,
)
from svft_diffusion.spectral import Core


class TrainingPaths:
    """The training side of one layer; it keeps a weight that was rebuilt for one forward pass.

    Args:
        parking: of the frozen weight, which some strategies don't read.
    """

    def __init__(self, parking: Parking) -> None:
        self._parking = parking
        self._rebuilt: tuple[object, Tensor] | None = None

    def forget(self) -> None:
        """Let go of the rebuilt weight."""
        self._rebuilt = None

    def output(
        self, kind: Kind, module: nn.Module, placed: PlacedFactors | None, inputs: Inputs, terms: Sequence[Term]
    ) -> Tensor:
        """Output of the frozen layer ``module`` with adapters that train."""
        own = computing.parameters_of(module)
        if kind == "norm" or inputs.args or inputs.kwargs or not has_plain_forward(module):
            self._parking.wake(module)
            factors = None if placed is None else placed.factors
            return inputs.give_with(module, computing.adapted_parameters(kind, own, factors, terms))
        x = inputs.x
        bias = computing.adapted_bias(own.get("bias"), terms)
        with_values = [term for term in terms if "values" in term.parts]
        if not with_values:
            assert bias is not None
            self._parking.wake(module)
            return _with_bias_alone(module, x, bias)
        assert placed is not None
        core, triplets = combined_core(placed.singular_values(x.device), with_values)
        if kind == "embedding":
            self._parking.wake(module)
            U, _, Vh = placed.chosen(x, module, triplets)
            y: Tensor = module(x)
            return y + computing.update_of_output(kind, module, x, U, core, Vh).to(y.dtype)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return self._convolution(module, placed, x, bias, core, triplets, with_values)
        return self._linear(kind, module, placed, x, bias, core, triplets, with_values)

    def _linear(
        self,
        kind: Kind,
        module: nn.Module,
        placed: PlacedFactors,
        x: Tensor,
        bias: Tensor | None,
        core: Core,
        triplets: Triplets,
        terms: Sequence[Term],
    ) -> Tensor:
        weight = matrix_of(kind, computing.parameters_of(module)["weight"])
        m, n = weight.shape
        strategy = plan_linear(
            m,
            n,
            core.rank,
            x.numel() // n,
            full_rank=_is_full(core, placed, weight),
            off_diagonals=None if core.dense else core.off_diagonals,
            gradient_to_input=x.requires_grad,
        )
        self._settle_weight(strategy, module)
        weight = matrix_of(kind, computing.parameters_of(module)["weight"])
        U, S, Vh = placed.chosen(x, module, triplets)
        rebuilt = self._rebuilt_weight(strategy, weight, U, core, Vh, terms)
        return adapted_linear(
            x, weight, bias, U, S, Vh, core, strategy=strategy, rebuilt=rebuilt, compress=_compresses(terms)
        )

    def _convolution(
        self,
        module: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        placed: PlacedFactors,
        x: Tensor,
        bias: Tensor | None,
        core: Core,
        triplets: Triplets,
        terms: Sequence[Term],
    ) -> Tensor:
        weight = module.weight.detach()
        padding: str | int | tuple[int, ...] = module.padding
        if module.padding_mode != "zeros":
            x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        strategy = plan_convolution(
            weight.shape[0],
            weight[0].numel(),
            core.rank,
            x.numel() // (x.shape[1 - weight.ndim] * math.prod(module.stride)),
            full_rank=_is_full(core, placed, weight),
            off_diagonals=None if core.dense else core.off_diagonals,
            gradient_to_input=x.requires_grad,
            input_elements=x.numel(),
        )
        self._settle_weight(strategy, module)
        weight = module.weight.detach()
        U, S, Vh = placed.chosen(x, module, triplets)
        rebuilt = self._rebuilt_weight(strategy, weight, U, core, Vh, terms)
        return adapted_convolution(
            x,
            weight,
            bias,
            U,
            S,
            Vh,
            core,
            kernel_size=module.kernel_size,
            stride=module.stride,
            padding=padding,
            dilation=module.dilation,
            strategy=strategy,
            rebuilt=rebuilt,
            compress=_compresses(terms),
        )

    def _settle_weight(self, strategy: Strategy, module: nn.Module) -> None:
        """Have the frozen weight at hand for a strategy, or let it go."""
        if strategy == "factors":
            self._parking.park(module)
        else:
            self._parking.wake(module)

    def _rebuilt_weight(
        self,
        strategy: Strategy,
        weight: Tensor,
        U: Tensor,
        core: Core,
        Vh: Tensor,
        terms: Sequence[Term],
    ) -> Tensor | None:
        """``W + U M V^T`` for the strategy of that name, made once for a forward pass, its recomputation included."""
        if strategy != "rebuilt":
            return None
        if core.entries.requires_grad:
            core.entries.register_hook(self._forget_in_backward)
        parts = (part for term in terms for part in term.parts.values())
        key = (U.dtype, [identity(tensor) for tensor in (weight, *parts)], [term.strength for term in terms])
        if self._rebuilt is None or self._rebuilt[0] != key:
            self._rebuilt = (key, rebuild_weight(weight, U, core, Vh).to(U.dtype))
        return self._rebuilt[1]

    def _forget_in_backward(self, gradient: Tensor) -> None:
        """An optimizer comes next, and many write through ``.data``, which leaves no trace."""
        self._rebuilt = None


def _with_bias_alone(module: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    """The bias outside of the product: given to a convolution, its frozen weight's gradient is computed too."""
    y = computing.run_with(module, {"bias": torch.zeros_like(bias, dtype=module.bias.dtype)}, (x,), {})  # type: ignore[arg-type]
    return y + along_features(module, bias, y.ndim).to(y.dtype)


def _is_full(core: Core, placed: PlacedFactors, weight: Tensor) -> bool:
    """Whether the factors alone give the weight: all of them, to float32 accuracy, which float64 is finer than."""
    return placed.exact and core.rank == len(placed.factors.S) and weight.dtype != torch.float64


def _compresses(terms: Sequence[Term]) -> bool:
    return any(term.options.compress for term in terms)
