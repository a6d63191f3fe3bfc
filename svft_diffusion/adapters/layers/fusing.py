"""Adapters folded into a copy of a layer's weight, for one call or until they are taken out without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.layers.computing import adapted_parameters, parameters_of, widened
from svft_diffusion.adapters.layers.kinds import Kind
from svft_diffusion.adapters.methods import Term
from svft_diffusion.spectral import SingularFactors

_SAMPLES = 1024


@dataclass(frozen=True)
class Folded:
    """A layer's weight and bias with adapters in them, and what they were made from."""

    parameters: dict[str, Tensor]
    state: object  # identities of the tensors, and strengths
    trained: list[Tensor]  # copies of the parts that may change without a trace

    def is_of(self, state: object, trained: Sequence[Tensor]) -> bool:
        """Whether nothing has changed since."""
        return self.state == state and all(map(torch.equal, self.trained, trained))


@dataclass(frozen=True)
class Fused:
    """What a base layer had before adapters were put into it, and how to know that nobody else wrote since."""

    kept: dict[str, nn.Parameter]  # weight and bias, those that changed
    written: dict[str, Tensor]  # a sample of each after writing
    terms: list[Term]  # copies: what is taken out must be what was put in


def fuse(kind: Kind, base: nn.Module, factors: SingularFactors | None, terms: Sequence[Term], *, safe: bool) -> Fused:
    """Give ``base`` a weight and bias of its own with the terms in them.

    Its parameters are not written to: other layers may share them, as the output layer of a language model does.

    Raises:
        ValueError: with ``safe``, when a number would not be finite; nothing is changed.
    """
    terms = [_copy(term, base.weight.device) for term in terms]  # type: ignore[arg-type]
    with torch.inference_mode(False), torch.no_grad():  # the model may train next
        adapted = adapted_parameters(kind, parameters_of(base), factors, terms)
    if safe and not all(torch.isfinite(tensor).all() for tensor in adapted.values()):
        raise ValueError("the adapters would put NaN or infinity into the layer")
    kept = {name: getattr(base, name) for name in adapted}
    for name, tensor in adapted.items():
        setattr(base, name, nn.Parameter(tensor, requires_grad=kept[name].requires_grad))
    return Fused(kept, {name: _sample(tensor) for name, tensor in adapted.items()}, terms)


def restore(kind: Kind, base: nn.Module, factors: SingularFactors | None, fused: Fused) -> None:
    """Give ``base`` its own parameters back; where somebody else wrote since, such as a LoRA, they get that part."""
    own = parameters_of(base)
    with torch.no_grad():
        for name, kept in fused.kept.items():
            kept.data = kept.data.to(own[name])  # the model may have moved since
        untouched = all(
            torch.allclose(_sample(own[name]), sample.to(own[name]), rtol=0, atol=0, equal_nan=True)
            for name, sample in fused.written.items()
        )
        if not untouched:
            terms = [_copy(term, own["weight"].device) for term in fused.terms]
            adapted = adapted_parameters(kind, {**own, **fused.kept}, factors, terms)
            for name, kept in fused.kept.items():
                kept.copy_(widened(own[name]) - (widened(adapted[name]) - widened(kept)))
    for name, kept in fused.kept.items():
        setattr(base, name, kept)


def _copy(term: Term, device: torch.device) -> Term:
    parts = {part: tensor.detach().to(device, copy=True) for part, tensor in term.parts.items()}
    positions = None if term.positions is None else term.positions.to(device, copy=True)
    return Term(term.strength, term.options, parts, positions)


def _sample(tensor: Tensor) -> Tensor:
    """Some elements spread over a tensor, enough to notice that another adapter was added to it."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].clone()
