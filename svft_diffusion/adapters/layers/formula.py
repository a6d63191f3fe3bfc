"""The formula as it stands: the output of the base layer, plus what the adapters add to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.layers import computing
from svft_diffusion.adapters.layers.kinds import Kind, has_plain_forward
from svft_diffusion.adapters.layers.placement import PlacedFactors, dtype_of_products
from svft_diffusion.adapters.methods import Term, combined_core, common_triplets
from svft_diffusion.errors import UserError
from svft_diffusion.files.quantized import is_quantized


class Inputs(NamedTuple):
    """What a layer is called with."""

    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def give(self, module: nn.Module) -> Tensor:
        """The output of a module for these inputs."""
        output: Tensor = module(self.x, *self.args, **self.kwargs)
        return output

    def give_with(self, module: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        """The output of a module for these inputs, with other parameters in place of its own."""
        return computing.run_with(module, parameters, (self.x, *self.args), self.kwargs)


def output_of_formula(
    kind: Kind,
    module: nn.Module,
    base_layer: nn.Module,
    placed: PlacedFactors | None,
    inputs: Inputs,
    terms: Sequence[Term],
) -> Tensor:
    """Output of a layer under ``torch.compile``, where another adapter lies inside, or where no weight can be read.

    ``module`` is the frozen layer itself, ``base_layer`` the same or an adapter layer around it.
    """
    if kind == "norm":
        return inputs.give_with(
            module, computing.adapted_parameters(kind, computing.parameters_of(module), None, terms)
        )
    y = inputs.give(base_layer)
    if not _adds_up(module):
        factors = None if placed is None else placed.factors
        return y + computing.change_of_output(kind, module, factors, terms, (inputs.x, *inputs.args), inputs.kwargs)
    with_values = [term for term in terms if "values" in term.parts]
    if with_values:
        assert placed is not None
        if torch.compiler.is_compiling():
            _place_for_graph(placed, module, inputs.x, with_values)
        core, triplets = combined_core(placed.singular_values(inputs.x.device), with_values)
        U, _, Vh = placed.chosen(inputs.x, module, triplets)
        y = y + computing.update_of_output(kind, module, inputs.x, U, core, Vh).to(y.dtype)
    with_bias = [term for term in terms if "bias" in term.parts]
    return computing.bias_of_output(module, with_bias, y) if with_bias else y


def output_for_samples(
    kind: Kind,
    module: nn.Module,
    base_layer: nn.Module,
    placed: PlacedFactors | None,
    inputs: Inputs,
    samples: Sequence[Sequence[Term]],
) -> Tensor:
    """Each sample of the batch with its own adapters and strengths, on one pass of the base layer.

    Args:
        samples: the terms of each sample: of the same adapters for all, each at its own strength. A batch that is a
            multiple of them repeats them, as classifier-free guidance doubles a batch.

    Raises:
        UserError: the batch is no multiple of the samples.
    """
    x = inputs.x
    if len(x) == 1 and kind == "embedding":  # one row of ids for all samples: those of positions
        x = x.expand(len(samples), *x.shape[1:]).contiguous()
    if len(x) % len(samples):
        raise UserError(
            f"a batch of {len(x)} can't be shared by {len(samples)} samples' adapters; give one prompt for each sample"
        )
    samples = [*samples] * (len(x) // len(samples))
    inputs = inputs._replace(x=x)
    y = inputs.give(base_layer)
    if kind != "norm" and not _adds_up(module):
        factors = None if placed is None else placed.factors
        changes = [
            computing.change_of_output(kind, module, factors, terms, (sample, *inputs.args), inputs.kwargs)
            for sample, terms in zip(x.split(1), samples, strict=True)
        ]
        return y + torch.cat(changes)
    if of_norm := _with_part("norm", samples):
        y = computing.norm_for_each_sample(module, x, y, of_norm)
    if of_values := _with_part("values", samples):
        assert placed is not None
        core, triplets = computing.core_for_each_sample(placed.singular_values(x.device), of_values)
        U, _, Vh = placed.chosen(x, module, triplets)
        y = y + computing.update_of_output(kind, module, x, U, core, Vh).to(y.dtype)
    if of_bias := _with_part("bias", samples):
        y = computing.bias_for_each_sample(module, of_bias, y)
    return y


def _adds_up(module: nn.Module) -> bool:
    """Whether an update of the weight adds ``U M V^T x`` to the output; quantized layers compute just their kind."""
    return has_plain_forward(module) or is_quantized(module)


def _with_part(part: str, samples: Sequence[Sequence[Term]]) -> list[list[Term]]:
    """Each sample's terms that have a part; nothing where none of them has."""
    chosen = [[term for term in terms if part in term.parts] for terms in samples]
    return chosen if chosen[0] else []


def _place_for_graph(placed: PlacedFactors, module: nn.Module, x: Tensor, terms: Sequence[Term]) -> None:
    size = len(placed.factors.S)
    triplets = common_triplets(size, terms)
    span = triplets if isinstance(triplets, slice) else slice(0, size)
    placed.place_for_graph(x.device, dtype_of_products(x, module), span.start, span.stop)
