"""The basis of singular vectors that an adapter's values stand on: its sketch in a layer, and following one."""

from __future__ import annotations

import torch
from torch import Tensor

from svft_diffusion.adapters.methods import (
    LISTED,
    LayerOptions,
    Term,
    Triplets,
    core_rows_and_columns,
    number_of_values,
)
from svft_diffusion.spectral import Alignment, SingularFactors, align_basis, basis_error, sketch_of_basis

LARGEST_SILENT_ERROR = 1e-3
"""Relative error of a basis above which loading an adapter says so."""

# A state dict asks for tensors of one size on every machine, a sketch is as long as its basis needs: its length
# comes first (4 bytes, little endian), zeros fill the rest.
_LENGTH_BYTES = 4
_BYTES_BESIDE = 24  # what a layer's sketch and its record in the file take at least, nearly


def stored_sketch(factors: SingularFactors, term: Term) -> Tensor:
    """Sketch of the triplets that an adapter trains, uint8, padded to a length that its options alone decide.

    Of the adapter's ``term``, the values need not be there yet.
    """
    budget = byte_budget(term.options)
    sketch = sketch_of_basis(_restricted(factors, term.triplets), signs=_needs_signs(term), byte_budget=budget)
    room = max(budget, len(sketch))
    if _signs_depend_on_positions(term.options):
        room = max(room, _BYTES_BESIDE + (term.options.rank + 1) // 2)
    stored = torch.zeros(_LENGTH_BYTES + room, dtype=torch.uint8)
    stored[:_LENGTH_BYTES] = torch.tensor(list(len(sketch).to_bytes(_LENGTH_BYTES, "little")), dtype=torch.uint8)
    stored[_LENGTH_BYTES : _LENGTH_BYTES + len(sketch)] = sketch
    return stored


def trimmed(stored: Tensor) -> Tensor:
    """A copy of the sketch in what `stored_sketch` made."""
    length = int.from_bytes(bytes(stored[:_LENGTH_BYTES].tolist()), "little")
    return stored[_LENGTH_BYTES : _LENGTH_BYTES + length].clone()


def byte_budget(options: LayerOptions) -> int:
    """Bytes that a sketch may take, beyond what it always holds: a fifth of the values', less what is stored beside."""
    return max(4 * number_of_values(options) // 5 - _BYTES_BESIDE, 0)


def aligned(factors: SingularFactors, sketch: Tensor, triplets: Triplets) -> Alignment:
    """Factors whose triplets follow a sketch; the others stay as they are. Raises as `align_basis`."""
    alignment = align_basis(_restricted(factors, triplets), sketch)
    if alignment.rotated or (alignment.signs < 0).any():
        U, Vh = factors.U.clone(), factors.Vh.clone()
        U[:, triplets], Vh[triplets] = alignment.factors.U, alignment.factors.Vh
        return alignment._replace(factors=SingularFactors(U, factors.S, Vh))
    return alignment._replace(factors=factors)


def signs_of_values(term: Term, signs: Tensor) -> Tensor:
    """``s_i s_j`` for each value ``m_ij``: what flipped triplets, ``signs`` (r,), do to an adapter's values."""
    rows, columns = core_rows_and_columns(term)
    return signs[rows] * signs[columns]


def error_of_signs_alone(factors: SingularFactors, alignment: Alignment, term: Term) -> float:
    """Relative error that is left where an adapter's values take the signs of an alignment, but not its rotations.

    Args:
        factors: those that the layer keeps.
        alignment: of them, from `aligned`.
        term: the adapter, for its triplets.
    """
    if not alignment.rotated:
        return alignment.error
    U, S, Vh = _restricted(factors, term.triplets)
    signs = alignment.signs.to(U)
    kept = SingularFactors(U * signs, S, Vh * signs[:, None])
    meant = _restricted(alignment.factors, term.triplets)
    return max(alignment.error, basis_error(kept, meant, signs=_needs_signs(term)))


def _needs_signs(term: Term) -> bool:
    """Whether the core has entries off its diagonal, which joint flips of singular vectors change."""
    if _signs_depend_on_positions(term.options):
        rows, columns = core_rows_and_columns(term)
        return not torch.equal(rows, columns)
    return term.options.off_diagonals > 0 or term.options.pattern in ("random", "top_k")


def _signs_depend_on_positions(options: LayerOptions) -> bool:
    return options.pattern == LISTED and not options.listed_triplets


def _restricted(factors: SingularFactors, triplets: Triplets) -> SingularFactors:
    return SingularFactors(factors.U[:, triplets], factors.S[triplets], factors.Vh[triplets])
