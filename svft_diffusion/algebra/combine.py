"""Sums of adapters as one adapter: a weighted blend, and the named cases of it.

All adapters are loaded in one pipeline, so they stand on one basis and their numbers can be added. The result is
another adapter there, which `svft_diffusion.save_adapter` writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from svft_diffusion.adapters import SpectralConfig, add_tokens, token_parameters, unload_adapter
from svft_diffusion.adapters.fitting import check_free
from svft_diffusion.adapters.injection import refuse_fused
from svft_diffusion.adapters.installing import install_adapter
from svft_diffusion.adapters.layers import SpectralLayer, matrix_of
from svft_diffusion.adapters.methods import LISTED, METHODS, Term
from svft_diffusion.adapters.names import check_adapter_name
from svft_diffusion.adapters.tokens import tokens_of
from svft_diffusion.adapters.training import adapted_layers
from svft_diffusion.adapters.tuner import trained_parts
from svft_diffusion.adapters.weights import AdapterWeight, weights_in_layers
from svft_diffusion.algebra.layout import Operand, common_options, places_of_sum
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import components_of
from svft_diffusion.files.tensor_names import POSITIONS, TOKENS, tensor_name
from svft_diffusion.spectral import Core, sum_of_cores


@torch.no_grad()
def combine(pipe: object, weights: Mapping[str, AdapterWeight], name: str) -> None:
    """Add an adapter that does at weight 1 what the given ones do together at these weights.

    SVDiff's shifts add up inside the relu (SVDiff, Eq. 4), so a sum of SVDiff adapters is one; the updates of the
    other methods add up as they are. Layers in which all weights are 0 are left out. As after loading, the new adapter
    is active beside those that were: choose with `set_adapters`, or see `replace_sources`. Learned tokens stay with
    the adapters that brought them.

    Args:
        pipe: a diffusers pipeline, or a mapping of component names to models.
        weights: as in `set_adapters`, for components and blocks too.
        name: of the new adapter.

    Raises:
        UserError: unknown adapter, component or block; nothing is left at these weights, or too much for float32;
            SVDiff would be added to another method, or norms shifted by entry to norms shifted as a whole. The
            pipeline is as it was.
    """
    components = components_of(pipe)
    check_adapter_name(name)
    check_free(components, name)
    for model in components.values():
        refuse_fused(model, "combine adapters")
    layers = {layer: module for source in weights for layer, module in adapted_layers(pipe, source).items()}
    operands = [operand for source, weight in weights.items() if (operand := _operand(pipe, source, weight)).terms]
    if not operands:
        raise UserError("nothing is left: the weights are 0 in every layer that the adapters have")
    used = {layer: layers[layer] for layer in layers if any(layer in operand.terms for operand in operands)}
    sizes = {layer: _size(module) for layer, module in used.items() if module.kind != "norm"}
    options = common_options(operands, sizes)
    tensors: dict[str, Tensor] = {}
    for canonical, layer in used.items():
        terms = [operand.terms[canonical] for operand in operands if canonical in operand.terms]
        of_layer = _tensors_of_layer(layer, terms, options, sizes.get(canonical, 0))
        tensors |= {tensor_name(canonical, part): tensor for part, tensor in of_layer.items()}
    for tensor in tensors.values():
        if not torch.isfinite(tensor).all():
            raise UserError("the sum is too large for float32; use smaller weights")
    if _is_rounding_error(tensors, operands):
        raise UserError("nothing is left: the adapters cancel each other out at these weights")
    install_adapter(components, name, options, tensors)


def replace_sources(pipe: object, sources: Sequence[str], name: str) -> None:
    """Unload the adapters that ``name`` was made of, and give it their learned tokens.

    A token has no strength and in a pipeline one owner, so the tokens can't be with both.

    Raises:
        UserError: unknown adapter.
    """
    tokens: dict[str, dict[str, Tensor]] = {}
    for source in sources:
        rows = token_parameters(pipe, source)
        for component, listed in tokens_of(pipe, source).items():
            held = rows[tensor_name(component, TOKENS)].detach().cpu().clone()
            tokens.setdefault(component, {}).update(zip(listed, held, strict=True))
    for source in sources:
        unload_adapter(pipe, source)
    if tokens:
        add_tokens(pipe, name, tokens)


def scale(pipe: object, source: str, factor: float, name: str) -> None:
    """``factor * source`` as adapter ``name``; raises as `combine`."""
    combine(pipe, {source: factor}, name)


def subtract(pipe: object, first: str, second: str, name: str) -> None:
    """``first - second`` as adapter ``name``; raises as `combine`."""
    combine(pipe, _distinct({first: 1.0, second: -1.0}, 2), name)


def interpolate(pipe: object, first: str, second: str, t: float, name: str) -> None:
    """``(1 - t) first + t second`` as adapter ``name``; raises as `combine`."""
    combine(pipe, _distinct({first: 1.0 - t, second: t}, 2), name)


def average(pipe: object, sources: Sequence[str], name: str) -> None:
    """The mean of adapters as adapter ``name``; raises as `combine`."""
    combine(pipe, _distinct(dict.fromkeys(sources, 1.0 / max(len(sources), 1)), len(sources)), name)


def _distinct(weights: dict[str, float], number: int) -> dict[str, float]:
    if len(weights) < number:
        raise UserError("an adapter is named twice")
    return weights


def _operand(pipe: object, name: str, weight: AdapterWeight) -> Operand:
    """An adapter at its weight, its numbers in float64 on the CPU: the sum is rounded once."""
    by_layer = weights_in_layers(pipe, name, weight)
    terms = {
        canonical: _in_double(layer.term(name, strength=by_layer[canonical], on_cpu=True))
        for canonical, layer in adapted_layers(pipe, name).items()
        if by_layer[canonical] != 0
    }
    configs = [getattr(model, "peft_config", {}).get(name) for model in components_of(pipe).values()]
    return Operand(name, next(config for config in configs if config is not None), terms)


def _in_double(term: Term) -> Term:
    return replace(term, parts={part: tensor.double() for part, tensor in term.parts.items()})


def _size(layer: SpectralLayer) -> int:
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    return min(matrix_of(layer.kind, weight).shape)


def _tensors_of_layer(
    layer: SpectralLayer, terms: Sequence[Term], options: Mapping[str, Any], size: int
) -> dict[str, Tensor]:
    """What the sum has in a layer, by part; zeros where it has room for what none of the terms has."""
    base = layer.get_base_layer()
    parts = _parts(layer, terms, options)
    tensors: dict[str, Tensor] = {}
    if "values" in parts:
        with_values = [term for term in terms if "values" in term.parts]
        rows, columns, positions = places_of_sum(options, with_values, size)
        total = summed_core(with_values, size)
        tensors["values"] = torch.zeros(len(rows)) if total is None else _entries(total, rows, columns)
        if positions is not None:
            tensors[POSITIONS] = positions
    for part in ("bias", "norm"):
        if part in parts:
            shifts = [term.strength * term.parts[part] for term in terms if part in term.parts]
            tensors[part] = torch.stack(shifts).sum(0) if shifts else torch.zeros(_length(base, part, options))
    return {part: tensor if part == POSITIONS else tensor.float() for part, tensor in tensors.items()}


def _is_rounding_error(tensors: Mapping[str, Tensor], operands: Sequence[Operand]) -> bool:
    """Whether a sum, in float32, is nothing beside what was added up."""
    terms = [term for operand in operands for term in operand.terms.values()]
    added = _largest(term.strength * part for term in terms for part in term.parts.values())
    left = _largest(tensor for tensor in tensors.values() if tensor.is_floating_point())
    return added > 0 and left <= torch.finfo(torch.float32).eps * added


def _largest(tensors: Iterable[Tensor]) -> float:
    return max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)


def _parts(layer: SpectralLayer, terms: Sequence[Term], options: Mapping[str, Any]) -> frozenset[str]:
    """What the sum has in a layer: what some term has, or what its options say of all layers."""
    base = layer.get_base_layer()
    if options.get("pattern") != LISTED:
        return trained_parts(base, layer.kind, SpectralConfig(**options))
    of_terms = {part for term in terms for part in term.parts}
    of_all = trained_parts(base, layer.kind, SpectralConfig(**options, numbers_of_values={}))
    return of_all & (of_terms | {"norm"})


def _length(base: torch.nn.Module, part: str, options: Mapping[str, Any]) -> int:
    if part == "norm" and options["norm_shift"] == "scalar":
        return 1
    parameter = base.bias if part == "bias" else base.weight
    assert isinstance(parameter, Tensor)
    return len(parameter)


def summed_core(terms: Sequence[Term], size: int) -> Core | None:
    """Sum of the cores over all triplets of a layer; of SVDiff's shifts before their relu."""
    everywhere, no_sigma = slice(0, size), torch.zeros(size, dtype=torch.float64)
    # Shifts of singular values add up like VectorFit's, whatever happens to their sum.
    rules = {term.options.method: METHODS["svft" if term.options.method == "svft" else "vectorfit"] for term in terms}
    cores = [rules[term.options.method].core(no_sigma, everywhere, [term]) for term in terms]
    return sum_of_cores(cores) if cores else None


def _entries(core: Core, rows: Tensor, columns: Tensor) -> Tensor:
    """Entries of a core matrix; those outside of its band are zero."""
    if core.dense:
        return core.entries[rows, columns]
    places = columns - rows + core.off_diagonals
    inside = (places >= 0) & (places < core.entries.shape[-1])
    return torch.where(inside, core.entries[rows, places.clamp(0, core.entries.shape[-1] - 1)], 0.0)
