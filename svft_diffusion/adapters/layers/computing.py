"""What adapters make of one layer: its adapted weight and bias, or what they add to its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from svft_diffusion.adapters.layers.kinds import Kind, along_features, expand, project, weight_of
from svft_diffusion.adapters.methods import Term, combined_core
from svft_diffusion.spectral import (
    Core,
    SingularFactors,
    apply_core,
    core_update,
    rescaled_norm_weight,
    stack_cores,
)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of sums: float32, or its own where that is wider."""
    return tensor.to(torch.promote_types(torch.float32, tensor.dtype))


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The frozen weight and, where there is one, bias of a layer, out of autograd's sight."""
    own = {name: getattr(module, name, None) for name in ("weight", "bias")}
    return {name: parameter.detach() for name, parameter in own.items() if isinstance(parameter, Tensor)}


def adapted_parameters(
    kind: Kind, parameters: Mapping[str, Tensor], factors: SingularFactors | None, terms: Sequence[Term]
) -> dict[str, Tensor]:
    """A layer's weight and bias with all terms in them: those that change, in the dtype they have.

    Differentiable in the terms' parts. Sums run in float32 or wider, so that a small shift is rounded once.
    """
    adapted = {}
    weight = parameters["weight"]
    if any(term.parts.keys() & {"values", "norm"} for term in terms):
        adapted["weight"] = (widened(weight) + update_of_weight(kind, weight, factors, terms)).to(weight.dtype)
    bias = adapted_bias(parameters.get("bias"), terms)
    if bias is not None and any("bias" in term.parts for term in terms):
        adapted["bias"] = bias.to(parameters["bias"].dtype)
    return adapted


def update_of_weight(kind: Kind, weight: Tensor, factors: SingularFactors | None, terms: Sequence[Term]) -> Tensor:
    """What the terms change in a weight: ``U M V^T`` or a norm's shift; shape of the weight, float32 or wider."""
    if kind == "norm":
        return norm_update(weight, [term for term in terms if "norm" in term.parts])
    assert factors is not None
    with_values = [term for term in terms if "values" in term.parts]
    factors = factors.to(weight.device)
    core, triplets = combined_core(factors.S, with_values)
    return weight_of(kind, core_update(factors.U[:, triplets], core, factors.Vh[triplets]), weight)


def adapted_bias(bias: Tensor | None, terms: Sequence[Term]) -> Tensor | None:
    """A layer's bias with the terms' shifts, float32 or wider; as it is where no term shifts it."""
    with_bias = [term for term in terms if "bias" in term.parts]
    if bias is None or not with_bias:
        return bias
    return widened(bias) + _sum("bias", with_bias)


def norm_update(weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """What shifts change in a norm's weight (C,): those for each entry add up, so do those of the whole norm."""
    w = widened(weight)
    scalars = [term for term in terms if term.options.norm_shift == "scalar"]
    vectors = [term for term in terms if term.options.norm_shift == "vector"]
    shifted = rescaled_norm_weight(w, _sum("norm", scalars), 1.0) if scalars else w
    update = shifted - w
    return update + _sum("norm", vectors) if vectors else update


def run_with(
    module: nn.Module, parameters: dict[str, Tensor], inputs: tuple[object, ...], named: dict[str, object]
) -> Tensor:
    """Output of a module with other parameters in place of its own."""
    output: Tensor = functional_call(module, parameters, inputs, named)
    return output


def update_of_output(kind: Kind, module: nn.Module, x: Tensor, U: Tensor, core: Core, Vh: Tensor) -> Tensor:
    """``U M V^T x``: what a core matrix (one, or one for each sample) adds to the output of a layer.

    ``U`` (m, r) and ``Vh`` (r, n) are in the dtype of the products; the core is applied in float32.
    """
    z = project(kind, module, x, Vh)
    return expand(kind, module, apply_core(z, core).to(U.dtype), U)


def change_of_output(
    kind: Kind,
    module: nn.Module,
    factors: SingularFactors | None,
    terms: Sequence[Term],
    inputs: tuple[object, ...],
    named: dict[str, object],
) -> Tensor:
    """What the terms change in the output of a layer that computes more than its kind does: ``f(W') - f(W)``."""
    own = parameters_of(module)
    adapted = {**own, **adapted_parameters(kind, own, factors, terms)}
    return run_with(module, adapted, inputs, named) - run_with(module, own, inputs, named)


def bias_of_output(module: nn.Module, terms: Sequence[Term], y: Tensor) -> Tensor:
    """``y`` plus the shifts of the layer's bias."""
    shift = _sum("bias", terms)
    return (widened(y) + along_features(module, shift, y.ndim)).to(y.dtype)


def core_for_each_sample(sigma: Tensor, terms_of_samples: Sequence[Sequence[Term]]) -> tuple[Core, slice | Tensor]:
    """A batch of cores from the terms of each sample; every sample has the same terms, at its own strengths."""
    cores = [combined_core(sigma, terms) for terms in terms_of_samples]
    return stack_cores([core for core, _ in cores]), cores[0][1]


def norm_for_each_sample(module: nn.Module, x: Tensor, y: Tensor, terms_of_samples: Sequence[Sequence[Term]]) -> Tensor:
    """A norm's output ``y`` with the weight of each sample: ``y + n(x) (w' - w)`` with ``n(x)`` the bare norm."""
    parameters = parameters_of(module)
    ones, zeros = torch.ones_like(parameters["weight"]), torch.zeros_like(parameters["weight"])
    updates = torch.stack([norm_update(parameters["weight"], terms) for terms in terms_of_samples])
    # A difference, since there are norms that multiply by 1 + w.
    normalized = run_with(module, {"weight": ones}, (x,), {}) - run_with(module, {"weight": zeros}, (x,), {})
    return (widened(y) + widened(normalized) * along_features(module, updates, y.ndim)).to(y.dtype)


def bias_for_each_sample(module: nn.Module, terms_of_samples: Sequence[Sequence[Term]], y: Tensor) -> Tensor:
    """``y`` plus the shifts of the layer's bias, those of each sample."""
    shifts = torch.stack([_sum("bias", terms) for terms in terms_of_samples])
    return (widened(y) + along_features(module, shifts, y.ndim)).to(y.dtype)


def _sum(part: str, terms: Sequence[Term]) -> Tensor:
    """``sum_a s_a delta_a`` over the terms' shifts of one part."""
    total = terms[0].strength * terms[0].parts[part]
    for term in terms[1:]:
        total = total + term.strength * term.parts[part]
    return total
