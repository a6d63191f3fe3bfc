"""SVFT as the authors' code keeps it in a state dict (github.com/VijayLingam95/SVFT, ``svft_layers.py``).

Each adapted linear layer has ``<module path>.svft_layer.`` with ``u`` (m, r), ``s_pre`` (r,), ``v`` (r, n), trained
``s`` (|Omega|,) at ``s_row``, ``s_col``, and ``gate`` (1,). What its ``merge_and_unload`` returns is
``u (diag(s_pre) + M) v`` with ``M = sum sigmoid(gate) s e_row e_col^T``; entries held twice add up.

``u`` and ``v`` come from another decomposition of the same weight: signs differ, and vectors of nearly equal singular
values are rotated among themselves. ``C = (U^T u) M (v V)`` is ``M`` in our basis, whatever the difference. In float32
the rotations alone change an update by some 1e-5 of its size, so that a few entries beside their pattern are kept too.
A rank below full drops the rest of the weight, which then is a part of the update: ``-sigma_i`` on the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svft_diffusion.errors import UserError
from svft_diffusion.exchange.base_layers import BaseLayer, base_layers, factors_of_layers, layers_of_file
from svft_diffusion.exchange.conversion import Conversion, Format, ProjectionOptions, chosen_pattern, converted_layer
from svft_diffusion.exchange.foreign_file import ForeignFile
from svft_diffusion.exchange.projection import Entries, band_of, largest_entries
from svft_diffusion.files.names import base_module, module_path
from svft_diffusion.files.tensor_names import POSITIONS, tensor_name
from svft_diffusion.spectral import SingularFactors, number_of_banded_positions

_LEVEL = ".svft_layer."
_PARTS = ("u", "s_pre", "s", "gate", "v", "s_row", "s_col")
_UNUSED_PARTS = ("s_pre_row", "s_pre_col")  # s_pre is diagonal

# Relative difference between their weight and ours above which theirs is another model's: one in 16 bit stays below.
_SAME_BASE = 1e-2
# Relative error of an update that counts as none.
_EXACT = 5e-6
# What their factors, in float32, leave of a weight that they give back whole, relative to its largest singular value.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class _Update:
    """One layer's update in our basis."""

    layer: BaseLayer
    core: Tensor  # (k, k) float32
    size: float  # norm of the update
    outside: float  # norm of the part of it that no core matrix makes

    def distance(self, entries: Entries) -> float:
        """Norm of what is left of the update when only some entries of its core are kept."""
        lost = self.core.clone()
        lost[entries.rows, entries.columns] = 0
        return math.hypot(self.outside, float(lost.double().norm()))


def _recognises(file: ForeignFile) -> bool:
    return any(_LEVEL in name for name in file.shapes)


def _convert(
    files: Sequence[ForeignFile], components: Mapping[str, nn.Module], options: ProjectionOptions
) -> Conversion:
    known = base_layers(components)
    updates: list[_Update] = []
    left_out: dict[str, str] = {}
    for file in files:
        paths = _paths_of(file)

        def misfit(path: str, layer: BaseLayer, file: ForeignFile = file) -> str | None:
            held = (file.shapes[f"{path}{_LEVEL}u"][0], file.shapes[f"{path}{_LEVEL}v"][1])
            if layer.kind != "linear":
                return f"is no linear layer but of kind {layer.kind}"
            return None if held == layer.matrix_shape else f"is {layer.matrix_shape}, in the file {held}"

        layers = layers_of_file(file, known, paths, misfit, {update.layer.component for update in updates})
        factors = factors_of_layers(components, layers.values())
        updates += [_update_of(file, path, layer, factors[layer.canonical]) for path, layer in layers.items()]
        left_out |= _other_tensors(file, components, next(iter(layers.values())).component)
    if options == ProjectionOptions():
        pattern, off_diagonals = _smallest_exact(updates)
    else:
        pattern, off_diagonals = chosen_pattern(options, [update.layer for update in updates])
    tensors, reports = {}, []
    for update in updates:
        entries = _entries_of(update.core, pattern, off_diagonals)
        tensors[tensor_name(update.layer.canonical, "values")] = entries.values
        positions = entries.positions(len(update.core))
        if positions is not None:
            tensors[tensor_name(update.layer.canonical, POSITIONS)] = positions
        reports.append(converted_layer(update.layer, update.size, update.distance(entries)))
    return Conversion(
        {"method": "svft", "pattern": pattern, "off_diagonals": off_diagonals}, tensors, reports, left_out
    )


def _paths_of(file: ForeignFile) -> list[str]:
    """Paths of the adapted layers, once each of them proved whole."""
    parts: dict[str, set[str]] = {}
    for name in file.shapes:
        path, level, part = name.partition(_LEVEL)
        if level:
            parts.setdefault(path, set()).add(part)
    for path, found in parts.items():
        if missing := sorted(set(_PARTS) - found):
            raise UserError(f"{file.name}: layer {path} lacks svft_layer.{missing[0]}, so the state dict is not whole")
        if unknown := sorted(found - {*_PARTS, *_UNUSED_PARTS}):
            raise UserError(f"{file.name}: layer {path} has svft_layer.{unknown[0]}, which SVFT's code does not make")
        shapes = {part: file.shapes[f"{path}{_LEVEL}{part}"] for part in _PARTS}
        rank, count = shapes["s_pre"], shapes["s"]
        fits = (
            len(shapes["u"]) == len(shapes["v"]) == 2
            and len(rank) == len(count) == 1
            and shapes["u"][1:] == shapes["v"][:1] == rank
            and shapes["s_row"] == shapes["s_col"] == count
            and shapes["gate"] == (1,)
            and rank[0] <= min(shapes["u"][0], shapes["v"][1])
        )
        if not fits:
            raise UserError(f"{file.name}: the sizes of u, s_pre, s, gate and v of layer {path} do not go together")
    return list(parts)


def _update_of(file: ForeignFile, path: str, layer: BaseLayer, factors: SingularFactors) -> _Update:
    held = file.tensors(f"{path}{_LEVEL}{part}" for part in _PARTS)
    u, s_pre, s, gate, v, row, column = (held[f"{path}{_LEVEL}{part}"] for part in _PARTS)
    rank = len(s_pre)
    for index in (row, column):
        if index.is_floating_point() or int(index.min()) < 0 or int(index.max()) >= rank:
            raise UserError(f"{file.name}: layer {path} has entries outside of its {rank} x {rank} matrix")
    row, column = row.long(), column.long()
    u, s_pre, v = u.double(), s_pre.double(), v.double()
    theirs = torch.zeros(rank, rank, dtype=torch.float64)
    theirs.index_put_((row, column), torch.sigmoid(gate.double()) * s.double(), accumulate=True)
    ours = SingularFactors(factors.U.double(), factors.S.double(), factors.Vh.double())
    left, right = ours.U.T @ u, v @ ours.Vh.T  # (k, r) and (r, k)
    kept = int((s_pre > 0).sum())
    _check_base(file, path, ours, (u, s_pre, v), kept)
    core, update = left @ theirs @ right, u @ theirs @ v
    if kept < len(ours.S):
        dropped = ours.S.diag() - (left * s_pre) @ right
        dropped[dropped.abs() < _ROUNDING * ours.S.max()] = 0
        core -= dropped
        update = update - ours.U @ dropped @ ours.Vh
    outside = float((update - ours.U @ core @ ours.Vh).norm())
    return _Update(layer, core.float(), float(update.norm()), outside)


def _check_base(
    file: ForeignFile, path: str, ours: SingularFactors, theirs: tuple[Tensor, Tensor, Tensor], kept: int
) -> None:
    """Refuse factors of another weight ``W``: theirs are singular triplets of ours, ``u^T W = diag(s_pre) v``."""
    u, s_pre, v = (theirs[0][:, :kept], theirs[1][:kept], theirs[2][:kept])
    distance = (u.T @ ours.U * ours.S) @ ours.Vh - s_pre[:, None] * v
    difference = float(distance.norm() / ours.S.norm().clamp(min=torch.finfo(torch.float32).tiny))
    if not difference <= _SAME_BASE:
        raise UserError(
            f"{file.name} was trained on another base: the weight of layer {path} differs by {difference:.2g} of its "
            "size; give the model that it was trained on as --base"
        )


def _smallest_exact(updates: Sequence[_Update]) -> tuple[str, int]:
    """Pattern and off-diagonals that hold every layer's update in the fewest numbers.

    Where not even as many entries as the smallest layer allows are enough, those; the error is in the report.
    """
    band, listed = _fewest(updates, "banded"), _fewest(updates, "random")
    if _holds(updates, "banded", band) and 2 * band + 1 <= 2 * (2 * listed + 1):  # a listed entry takes two numbers
        return ("banded" if band else "plain"), band
    return "random", listed


def _fewest(updates: Sequence[_Update], pattern: str) -> int:
    """Off-diagonals from which on a pattern holds all updates, or the most that the smallest layer has."""
    fewest, most = 0, min(len(update.core) for update in updates) - 1
    while fewest < most:
        middle = (fewest + most) // 2
        fewest, most = (fewest, middle) if _holds(updates, pattern, middle) else (middle + 1, most)
    return fewest


def _holds(updates: Iterable[_Update], pattern: str, off_diagonals: int) -> bool:
    """Whether a pattern loses next to nothing of what the updates are in the basis."""
    return all(
        update.distance(_entries_of(update.core, pattern, off_diagonals))
        <= math.hypot(_EXACT * update.size, update.outside)
        for update in updates
    )


def _entries_of(core: Tensor, pattern: str, off_diagonals: int) -> Entries:
    if pattern == "random":
        return largest_entries(core, number_of_banded_positions(len(core), off_diagonals))
    return band_of(core, off_diagonals)


def _other_tensors(file: ForeignFile, components: Mapping[str, nn.Module], component: str) -> dict[str, str]:
    """What else the state dict holds that is not the base's own."""
    left_out = {}
    model = components[component]
    for name, shape in file.shapes.items():
        if _LEVEL in name:
            continue
        path, _, parameter = name.rpartition(".")
        try:
            module = base_module(model.get_submodule(module_path(model, path)))
        except AttributeError:
            left_out[name] = "the base has no such tensor"
            continue
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        own = tensors.get(parameter)
        if own is None or tuple(own.shape) != shape:
            left_out[name] = "the base has no such tensor"
            continue
        held = file.tensors([name])[name]
        if not torch.allclose(held.double(), own.detach().cpu().double(), rtol=_SAME_BASE, atol=_SAME_BASE / 100):
            left_out[name] = "it differs from the base's"
    return left_out


SVFT = Format("SVFT (state dict of the authors' code)", _recognises, _convert, projects=True)
