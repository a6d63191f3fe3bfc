"""Export of an adapter to a LoRA file that other tools read without this package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
from svft_diffusion.exchange.export_report import AUTO_TOLERANCE, CarriedDifference, CarriedLayer, ExportReport, LeftOut
from svft_diffusion.exchange.lora_factors import (
    CoreFactors,
    decompose_core,
    lora_factors,
    rounding_error,
    smallest_rank,
)
from svft_diffusion.exchange.lora_keys import FORMATS, Format, NoName, layer_key, lora_names
from svft_diffusion.exchange.lora_metadata import lora_metadata
from svft_diffusion.files.names import components_of
from svft_diffusion.settings import nearest_hint

Rank = int | Literal["auto", "full"]
Dtype = Literal["float32", "float16"]
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}

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
    """Tensors by name; what the file's header says beside them; and what they hold of the adapter."""

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
    pipe: object,
    name: str,
    *,
    format: Format = "kohya",
    rank: Rank = "auto",
    strength: float = 1.0,
    dtype: Dtype = "float32",
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
        dtype: of the tensors, other than alphas; the report counts what rounding to it loses.

    Raises:
        UserError: no such adapter, it is fused, an argument is out of range, the format holds nothing of it, or a
            value is too large for ``dtype``.
    """
    check_arguments(format, rank, strength, dtype)
    components = components_of(pipe)
    layers = adapted_layers(components, name)
    for model in components.values():
        refuse_fused(model, f"export {name!r}")
    largest = {"auto": AUTO_LARGEST_RANK, "full": None}[rank] if isinstance(rank, str) else rank
    contents = _Contents(format, components, largest, DTYPES[dtype])
    for canonical, layer in layers.items():
        contents.add(canonical, layer, layer.term(name, strength=strength, on_cpu=True))
    if not (contents.matrices or contents.dense):
        raise UserError(f"{_why_nothing(contents, name, strength)}; there is nothing to export")
    matrices = contents.matrices
    chosen = _common_rank([matrix.core for matrix in matrices], rank)
    tensors, carried = dict(contents.dense), []
    for matrix in matrices:
        held, described = _lora_of(matrix, format, chosen, DTYPES[dtype])
        tensors |= held
        carried.append(described)
    report = ExportReport(
        format,
        chosen,
        rank == "auto",
        strength,
        dtype,
        tuple(carried),
        tuple(contents.differences),
        tuple(contents.left_out),
    )
    has_convolutions = any(matrix.layer.kind == "convolution" for matrix in matrices)
    metadata = lora_metadata(pipe, format, chosen, has_convolutions=has_convolutions)
    return ExportedLora(dict(sorted(tensors.items())), metadata, report)


def check_arguments(format: str, rank: Rank, strength: float, dtype: str = "float32") -> None:
    """Raise `UserError` if one of the arguments of `export_lora` is out of range."""
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}{nearest_hint(format, FORMATS)}; choose from {', '.join(FORMATS)}")
    if rank not in ("auto", "full") and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise UserError(f"rank must be a whole number of at least 1, auto or full, got {rank!r}")
    if not math.isfinite(strength) or strength == 0:
        raise UserError(f"strength must be a finite number other than 0, got {strength}")
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}{nearest_hint(dtype, DTYPES)}; choose from {', '.join(DTYPES)}")


class _Contents:
    """What of an adapter a format holds, and how; what is zero is nowhere."""

    def __init__(
        self, format: Format, components: Mapping[str, nn.Module], largest_rank: int | None, dtype: torch.dtype
    ) -> None:
        self.format = format
        self.dtype = dtype
        self.components = components
        self.largest_rank = largest_rank
        self.matrices: list[_Matrix] = []
        self.dense: dict[str, Tensor] = {}  # by tensor name
        self.differences: list[CarriedDifference] = []  # what the dense tensors are
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
            self.dense.setdefault(f"{key}.w_norm", update.to(self.dtype))

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
            exact = difference()
            held = _rounded(exact, self.dtype, f"{name}.{part}")
            self.dense[f"{key}{ending}"] = held
            rounding = float((held.double() - exact.double()).norm())
            self.differences.append(CarriedDifference(name, part, norm, rounding))


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


def _lora_of(matrix: _Matrix, format: Format, rank: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], CarriedLayer]:
    """``A``, ``B`` and alpha of a layer; those of a convolution as kernels, ``B`` with one of size 1."""
    weight, core = _weight_of(matrix.layer), matrix.core
    assert matrix.layer.factors is not None
    U, _, Vh = matrix.layer.factors
    triplets = matrix.triplets.long() if isinstance(matrix.triplets, Tensor) else matrix.triplets
    B, A = lora_factors(U[:, triplets], core, Vh[triplets], rank)
    held_B, held_A = _rounded(B, dtype, matrix.name), _rounded(A, dtype, matrix.name)
    down, up, alpha = lora_names(format, matrix.key)
    tensors = {
        down: held_A.reshape(rank, *weight.shape[1:]),
        up: held_B.reshape(len(B), rank, *[1] * (weight.ndim - 2)),
    }
    if alpha is not None:  # in float32 always: float16 does not have every rank
        tensors[alpha] = torch.tensor(float(rank))
    rounding = rounding_error(core.s, B, A, held_B, held_A)
    return tensors, CarriedLayer(matrix.name, core.dropped(0), core.rank, core.dropped(rank), rounding)


def _rounded(exact: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Values in the dtype of the file.

    Raises:
        UserError: one is too large for it.
    """
    rounded = exact.to(dtype).contiguous()
    if not torch.isfinite(rounded).all():
        largest, limit = float(exact.abs().max()), torch.finfo(dtype).max
        raise UserError(
            f"the update of {name} has values up to {largest:.3g}, {str(dtype).removeprefix('torch.')} ends at "
            f"{limit:.3g}; export with a smaller strength, or with dtype float32"
        )
    return rounded
