"""Export of an adapter to a LoRA file that other tools read without this package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.injection import refuse_fused
from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.adapters.layers.computing import norm_update, update_of_weight
from svft_diffusion.adapters.layers.kinds import Kind, has_plain_forward
from svft_diffusion.adapters.methods import Term, Triplets, combined_core
from svft_diffusion.adapters.training import adapted_layers
from svft_diffusion.errors import UserError
from svft_diffusion.exchange.export_report import AUTO_TOLERANCE, CarriedLayer, ExportReport, LeftOut
from svft_diffusion.exchange.lora_factors import CoreFactors, decompose_core, lora_factors, smallest_rank
from svft_diffusion.exchange.lora_keys import FORMATS, Format, NoName, layer_key, lora_names
from svft_diffusion.exchange.lora_metadata import lora_metadata
from svft_diffusion.files.names import components_of
from svft_diffusion.settings import nearest_hint

Rank = int | Literal["auto", "full"]

AUTO_LARGEST_RANK = 128
"""Rank at which ``rank="auto"`` ends at any error: tools expect no larger LoRA, and files grow with the rank."""

_NO_BIAS = "this format has no place for biases; comfy-full has"
_NO_LORA: dict[Kind, str] = {
    "norm": "a norm's weight is no matrix; comfy-full holds it",
    "embedding": "the readers of this format don't adapt embeddings; comfy-full holds them",
    "conv1d": "the readers of this format don't know transformers' Conv1D",
}
_NO_PLAIN_FORWARD = "a LoRA beside it would not be the same: it has groups, or computes more than its product"


@dataclass(frozen=True)
class ExportedLora:
    """Tensors by name, all float32; what the file's header says beside them; and what they hold of the adapter."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    report: ExportReport


class _Matrix(NamedTuple):
    """The update of one layer that becomes a LoRA."""

    name: str  # canonical
    key: str
    layer: SpectralLayer
    core: CoreFactors
    triplets: Triplets


@torch.no_grad()
def export_lora(
    pipe: object, name: str, *, format: Format = "kohya", rank: Rank = "auto", strength: float = 1.0
) -> ExportedLora:
    """An adapter of a pipeline as a LoRA: exact up to the rank, the best possible one below it.

    All layers get one common rank, padded with zeros, and alpha = rank: readers confuse the alphas of layers
    otherwise. A rank above that of every update is cut to it.

    Args:
        pipe: a diffusers pipeline, or a mapping of component names to models.
        name: the adapter. The weight it has in the pipeline doesn't matter, ``strength`` does.
        format: ``kohya`` is read by the most tools, ``diffusers`` by diffusers and PEFT, ``comfy-full`` by ComfyUI
            alone; it also holds biases, norms and embeddings.
        rank: a number; ``full`` for the rank of the adapter; ``auto`` for the smallest one with a relative error below
            `AUTO_TOLERANCE`, at most `AUTO_LARGEST_RANK`.
        strength: of the adapter. That of the LoRA it becomes multiplies the result, which for SVDiff is another thing
            where singular values end at zero.

    Raises:
        UserError: no such adapter, it is fused, an argument is out of range, or the format holds nothing of it.
    """
    check_arguments(format, rank, strength)
    components = components_of(pipe)
    layers = adapted_layers(components, name)
    for model in components.values():
        refuse_fused(model, f"export {name!r}")
    largest = {"auto": AUTO_LARGEST_RANK, "full": None}[rank] if isinstance(rank, str) else rank
    contents = _Contents(format, components, largest)
    for canonical, layer in layers.items():
        contents.add(canonical, layer, _term(layer, name, strength))
    if not (contents.matrices or contents.dense):
        raise UserError(f"{_why_nothing(contents, name, strength)}; there is nothing to export")
    matrices = contents.matrices
    chosen = _common_rank([matrix.core for matrix in matrices], rank)
    carried = tuple(
        CarriedLayer(matrix.name, matrix.core.dropped(0), matrix.core.rank, matrix.core.dropped(chosen))
        for matrix in matrices
    )
    report = ExportReport(
        format, chosen, rank == "auto", strength, carried, contents.dense_norms, tuple(contents.left_out)
    )
    tensors = contents.dense | _lora_tensors(format, matrices, chosen)
    has_convolutions = any(matrix.layer.kind == "convolution" for matrix in matrices)
    metadata = lora_metadata(pipe, format, chosen, has_convolutions=has_convolutions)
    return ExportedLora(dict(sorted(tensors.items())), metadata, report)


def check_arguments(format: str, rank: Rank, strength: float) -> None:
    """Raise `UserError` if one of the arguments of `export_lora` is out of range."""
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}{nearest_hint(format, FORMATS)}; choose from {', '.join(FORMATS)}")
    if rank not in ("auto", "full") and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise UserError(f"rank must be a whole number of at least 1, auto or full, got {rank!r}")
    if not math.isfinite(strength) or strength == 0:
        raise UserError(f"strength must be a finite number other than 0, got {strength}")


def _term(layer: SpectralLayer, name: str, strength: float) -> Term:
    """The adapter's part in a layer, on the CPU."""
    positions = layer.positions(name)
    parts = {part: tensor.detach().cpu() for part, tensor in layer.trained_parts(name).items()}
    return Term(strength, layer.options[name], parts, None if positions is None else positions.cpu())


class _Contents:
    """What of an adapter a format holds, and how; what is zero is nowhere."""

    def __init__(self, format: Format, components: Mapping[str, nn.Module], largest_rank: int | None) -> None:
        self.format = format
        self.components = components
        self.largest_rank = largest_rank
        self.matrices: list[_Matrix] = []
        self.dense: dict[str, Tensor] = {}  # by tensor name
        self.dense_norms: dict[str, float] = {}  # by canonical name and part
        self.left_out: list[LeftOut] = []

    def add(self, name: str, layer: SpectralLayer, term: Term) -> None:
        """Everything that ``term`` changes in the layer with the canonical name ``name``."""
        key = layer_key(self.format, name, self.components)
        if "values" in term.parts:
            self._add_matrix(name, key, layer, term)
        bias = term.strength * term.parts["bias"] if "bias" in term.parts else None
        if layer.kind == "norm":
            self._add_norm(name, key, layer, term, bias)
        elif bias is not None:
            self._add_difference(name, "bias", key, ".diff_b", float(bias.norm()), lambda: bias, _NO_BIAS)

    def _add_matrix(self, name: str, key: str | NoName, layer: SpectralLayer, term: Term) -> None:
        factors = layer.factors
        assert factors is not None
        core, triplets = combined_core(factors.S, [term])
        decomposed = decompose_core(core, largest_rank=self.largest_rank)
        no_lora = _why_no_lora(layer)
        if no_lora is None and isinstance(key, str):
            if decomposed.rank:
                self.matrices.append(_Matrix(name, key, layer, decomposed, triplets))
            return
        self._add_difference(
            name, "weight", key, ".diff", float(decomposed.s.norm()),
            lambda: update_of_weight(layer.kind, _weight_of(layer).cpu(), factors, [term]), no_lora or "",
        )  # fmt: skip

    def _add_norm(self, name: str, key: str | NoName, layer: SpectralLayer, term: Term, bias: Tensor | None) -> None:
        weight = _weight_of(layer).cpu()
        update = norm_update(weight, [term]) if "norm" in term.parts else torch.zeros(weight.shape)
        reason = _NO_LORA["norm"]
        self._add_difference(name, "weight", key, ".w_norm", float(update.norm()), lambda: update, reason)
        if bias is None:
            return
        self._add_difference(name, "bias", key, ".b_norm", float(bias.norm()), lambda: bias, _NO_BIAS)
        if f"{key}.b_norm" in self.dense:  # ComfyUI reads a norm's bias only beside its weight
            self.dense.setdefault(f"{key}.w_norm", update)

    def _add_difference(
        self,
        name: str,
        part: str,
        key: str | NoName,
        ending: str,
        norm: float,
        difference: Callable[[], Tensor],
        reason: str,
    ) -> None:
        """A dense difference where the format has them, else a line on why there is none."""
        if norm == 0:
            return
        if isinstance(key, NoName):
            self.left_out.append(LeftOut(name, part, norm, key.reason))
        elif self.format != "comfy-full":
            self.left_out.append(LeftOut(name, part, norm, reason))
        else:
            self.dense[f"{key}{ending}"] = difference().float().contiguous()
            self.dense_norms[f"{name}.{part}"] = norm


def _weight_of(layer: SpectralLayer) -> Tensor:
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _why_no_lora(layer: SpectralLayer) -> str | None:
    """Why a LoRA can't hold the update of a layer's matrix, or None."""
    if layer.kind in _NO_LORA:
        return _NO_LORA[layer.kind]
    return None if has_plain_forward(layer.get_base_layer()) else _NO_PLAIN_FORWARD


def _common_rank(cores: list[CoreFactors], rank: Rank) -> int:
    if not cores:
        return 0
    if rank == "auto":
        return min(smallest_rank(cores, AUTO_TOLERANCE), AUTO_LARGEST_RANK)
    largest = max(core.rank for core in cores)
    return largest if isinstance(rank, str) else min(rank, largest)


def _why_nothing(contents: _Contents, name: str, strength: float) -> str:
    reasons = sorted({lost.reason for lost in contents.left_out})
    if reasons:
        return f"nothing of adapter {name!r} fits format {contents.format}: {'; '.join(reasons)}"
    return f"adapter {name!r} changes nothing at strength {strength:g}"


def _lora_tensors(format: Format, matrices: Iterable[_Matrix], rank: int) -> dict[str, Tensor]:
    """``A``, ``B`` and alpha of every layer; those of a convolution as kernels, ``B`` with one of size 1."""
    tensors = {}
    for matrix in matrices:
        weight = _weight_of(matrix.layer)
        assert matrix.layer.factors is not None
        U, _, Vh = matrix.layer.factors
        triplets = matrix.triplets.long() if isinstance(matrix.triplets, Tensor) else matrix.triplets
        B, A = lora_factors(U[:, triplets], matrix.core, Vh[triplets], rank)
        down, up, alpha = lora_names(format, matrix.key)
        tensors[down] = A.reshape(rank, *weight.shape[1:]).contiguous()
        tensors[up] = B.reshape(len(B), rank, *[1] * (weight.ndim - 2)).contiguous()
        if alpha is not None:
            tensors[alpha] = torch.tensor(float(rank))
    return tensors
