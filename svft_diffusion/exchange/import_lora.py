"""A plain LoRA, projected to the singular vectors of the base: kohya's spelling, diffusers' and PEFT's.

A layer's update is ``dW = scale B A``: ``B`` (m, r) is called up or lora_B, ``A`` (r, n) down or lora_A, and ``scale``
is ``alpha / r`` (1 without an alpha). Of convolutions (LoCon) ``A`` is a kernel, in Tucker form times a third factor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svft_diffusion.errors import UserError
from svft_diffusion.exchange.base_layers import BaseLayer, base_layers, factors_of_layers
from svft_diffusion.exchange.conversion import (
    Conversion,
    Format,
    ProjectionOptions,
    chosen_pattern,
    converted_layer,
)
from svft_diffusion.exchange.foreign_file import ForeignFile
from svft_diffusion.exchange.import_lora_names import layers_by_name, names_in_diffusers_spelling, without_processor
from svft_diffusion.exchange.import_lora_settings import LoraSettings, lora_settings
from svft_diffusion.exchange.projection import project_product, size_of_product
from svft_diffusion.files.tensor_names import POSITIONS, tensor_name

# Ends of tensor names: what stands in front of them is the layer.
_ROLES = {
    "down": r"\.lora_down\.weight|\.lora_A(\.default)?\.weight|\.lora\.down\.weight|\.lora_linear_layer\.down\.weight"
    r"|_lora\.down\.weight",
    "up": r"\.lora_up\.weight|\.lora_B(\.default)?\.weight|\.lora\.up\.weight|\.lora_linear_layer\.up\.weight"
    r"|_lora\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
}
_NAME = re.compile(r"(?P<layer>.+?)(?:" + "|".join(f"(?P<{role}>{end})" for role, end in _ROLES.items()) + ")")
# Updates that are no product of two factors, by a part of a tensor's name.
_OTHER_KINDS = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".hada_w": "LoHa",
    ".lokr_w": "LoKr",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".vera_lambda": "VeRA",
}
_OTHER_FORMATS = re.compile(r".+(\.delta|\.svft_layer\.\w+)")
# Dense differences of weights, biases and norms, which the adapter leaves out.
_DIFFERENCE = re.compile(r".+\.(diff|diff_b|w_norm|b_norm)")


@dataclass(frozen=True)
class _Factors:
    """A layer's ``B`` (m, r) and ``A`` (r, n), scaled."""

    B: Tensor
    A: Tensor

    @property
    def size(self) -> float:
        """``||B A||``."""
        return size_of_product(self.B, self.A)


def _recognises(file: ForeignFile) -> bool:
    matches = (_NAME.fullmatch(name) for name in file.shapes)
    return any(match is not None and match["alpha"] is None for match in matches) or _other_kind(file) is not None


def _convert(
    files: Sequence[ForeignFile], components: Mapping[str, nn.Module], options: ProjectionOptions
) -> Conversion:
    table = layers_by_name(base_layers(components))
    products: dict[str, tuple[BaseLayer, _Factors]] = {}
    left_out: dict[str, str] = {}
    lost = 0.0
    for file in files:
        if kind := _other_kind(file):
            raise UserError(f"{file.name} is a {kind}, no plain LoRA, and can't be imported")
        settings = lora_settings(file)
        by_layer, rest = _tensors_by_layer(file, components)
        if mixed := next((name for name in rest if _OTHER_FORMATS.fullmatch(name)), None):
            raise UserError(
                f"{file.name} mixes a LoRA with another format: {mixed!r}; import each from a file of its own"
            )
        left_out |= dict.fromkeys(rest, "it is no factor of a product")
        differences = file.tensors(name for name in rest if _DIFFERENCE.fullmatch(name))
        lost = math.hypot(lost, *(float(difference.double().norm()) for difference in differences.values()))
        for name, roles in by_layer.items():
            layer = table.get(without_processor(name))
            held = file.tensors(roles.values())
            product = _product(file, name, {role: held[tensor] for role, tensor in roles.items()}, layer, settings)
            if layer is None:
                left_out[name] = "the base has no such layer"
                lost = math.hypot(lost, product.size)
            elif layer.canonical in products:
                raise UserError(f"{file.name}: {name} changes layer {layer.canonical}, which another name does too")
            else:
                products[layer.canonical] = (layer, product)
    if not products:
        raise UserError(
            f"{files[0].name} was made for another base: none of its {len(left_out)} layers is in this one, "
            f"such as {next(iter(left_out))}"
        )
    return _projected(components, products, options, left_out, lost)


def _projected(
    components: Mapping[str, nn.Module],
    products: Mapping[str, tuple[BaseLayer, _Factors]],
    options: ProjectionOptions,
    left_out: dict[str, str],
    lost: float,
) -> Conversion:
    pattern, off_diagonals = chosen_pattern(options, [layer for layer, _ in products.values()])
    factors = factors_of_layers(components, (layer for layer, _ in products.values()))
    tensors, reports = {}, []
    for canonical, (layer, product) in products.items():
        basis = factors[canonical]
        projection = project_product(basis, product.B, product.A, pattern=pattern, off_diagonals=off_diagonals)
        tensors[tensor_name(canonical, "values")] = projection.entries.values.float()
        positions = projection.entries.positions(len(basis.S))
        if positions is not None:
            tensors[tensor_name(canonical, POSITIONS)] = positions
        reports.append(converted_layer(layer, projection.size, projection.distance))
    fields = {"method": "svft", "pattern": pattern, "off_diagonals": off_diagonals}
    return Conversion(fields, tensors, reports, left_out, lost)


def _product(
    file: ForeignFile,
    name: str,
    held: Mapping[str, Tensor],
    layer: BaseLayer | None,
    settings: Mapping[str, LoraSettings],
) -> _Factors:
    """The update of one layer, once its sizes proved to go together and with the base."""
    if not {"down", "up"} <= held.keys():
        raise UserError(f"{file.name}: {name} has only one of the two factors of its update")
    down, up, mid = held["down"], held["up"], held.get("mid")
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != down.shape[0] or up[0, 0].numel() != 1:
        raise UserError(f"{file.name}: the factors of {name}, {tuple(up.shape)} and {tuple(down.shape)}, do not fit")
    rank = down.shape[0]
    if mid is not None and (mid.ndim < 3 or mid.shape[:2] != (rank, rank) or down[0, 0].numel() != 1):
        raise UserError(f"{file.name}: the three factors of {name} do not go together")
    shape = len(up), down[0].numel() * (1 if mid is None else mid[0, 0].numel())
    if layer is not None and shape != layer.matrix_shape:
        raise UserError(
            f"{file.name} was made for another base: its update of layer {layer.canonical} is {shape[0]} x {shape[1]}, "
            f"the base's weight {layer.matrix_shape[0]} x {layer.matrix_shape[1]}"
        )
    B, A = up.reshape(len(up), rank), down.reshape(rank, -1)
    if mid is not None:
        if layer is None:  # only its size counts, and a triangle, which may be far smaller, has the same
            A = torch.linalg.qr(A.T.double(), mode="r").R.T
        A = torch.einsum("pq...,qc->pc...", mid.to(A.dtype), A).reshape(rank, -1)
    if "alpha" in held:
        if held["alpha"].numel() != 1:
            raise UserError(f"{file.name}: the alpha of {name} is no single number")
        scale = float(held["alpha"]) / rank
    else:
        component = name.partition(".")[0] if layer is None else layer.component
        own = settings.get(component, settings.get("", LoraSettings()))
        scale = own.scale(name if layer is None else layer.path, rank)
    return _Factors(scale * B, A)


def _tensors_by_layer(
    file: ForeignFile, components: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Layer as the file calls it -> role -> tensor name; and the names of what has no role."""
    renamed = names_in_diffusers_spelling(file, components)
    by_layer: dict[str, dict[str, str]] = {}
    rest = []
    for name, tensor in renamed.items():
        match = _NAME.fullmatch(name)
        if match is None:
            rest.append(tensor)
            continue
        roles = by_layer.setdefault(match["layer"], {})
        role = next(role for role in _ROLES if match[role] is not None)
        if role in roles:
            raise UserError(f"{file.name} holds the factors of {match['layer']} twice, in two spellings")
        roles[role] = tensor
    for layer in [layer for layer, roles in by_layer.items() if not roles.keys() & {"down", "up"}]:
        rest += by_layer.pop(layer).values()  # the alpha of an update of another kind
    return by_layer, rest


def _other_kind(file: ForeignFile) -> str | None:
    kinds = (kind for name in file.shapes for mark, kind in _OTHER_KINDS.items() if mark in name)
    return next(kinds, None)


LORA = Format("LoRA", _recognises, _convert, projects=True)
