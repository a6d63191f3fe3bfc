"""The core matrix ``M`` of an update ``U M V^T`` over ``r`` singular triplets ``(u_i, sigma_i, v_i)``.

A core with ``d`` off-diagonals on each side is kept by its diagonals: ``entries`` (r, 2d+1) with
``entries[i, d + o] = M[i, i + o]``, and zero at places outside the matrix. A diagonal ``M`` is the case d = 0. Cores
that are no band (SVFT's random and top-k patterns) are kept dense: ``entries`` (r, r). One leading dimension in front
of either makes a batch: one core for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Core(NamedTuple):
    """``M`` (r, r) by its diagonals, ``entries`` (..., r, 2d+1), or dense, ``entries`` (..., r, r)."""

    entries: Tensor
    dense: bool = False

    @property
    def rank(self) -> int:
        """``r``, the number of singular triplets that the core acts on."""
        return self.entries.shape[-2]

    @property
    def off_diagonals(self) -> int:
        """``d``, off-diagonals on each side of the diagonal.

        Raises:
            ValueError: the core is dense.
        """
        if self.dense:
            raise ValueError("a dense core is not kept by its diagonals")
        return (self.entries.shape[-1] - 1) // 2

    @property
    def batched(self) -> bool:
        """Whether a leading dimension holds one core for each sample of a batch."""
        return self.entries.ndim == 3


def diagonal_core(values: Tensor) -> Core:
    """``M = diag(values)`` for ``values`` (..., r)."""
    return Core(values[..., None])


def core_matrix(core: Core) -> Tensor:
    """The dense ``M`` (..., r, r)."""
    if core.dense:
        return core.entries
    rank, off_diagonals = core.rank, core.off_diagonals
    length = rank + 2 * off_diagonals
    # Rows of length r + 2d + 1 read as rows of length r + 2d: each starts one place further right than the one above.
    skewed = functional.pad(core.entries, (0, rank)).flatten(-2)[..., : rank * length]
    return skewed.reshape(*skewed.shape[:-1], rank, length)[..., off_diagonals : off_diagonals + rank]


def apply_core(z: Tensor, core: Core) -> Tensor:
    """``z M^T`` for ``z`` (..., r): ``y_i = sum_j M[i, j] z_j``; with a batch of cores ``z`` is (B, ..., r).

    By diagonals it is one elementwise product for each of them. In 16 bit, ``z`` is promoted to the dtype of the
    core, under autocast too: small entries of ``M`` would be lost otherwise.
    """
    if core.dense:
        return _einsum("b...j,bij->b...i" if core.batched else "...j,ij->...i", z, core.entries)
    entries = core.entries
    if core.batched:
        entries = entries.reshape(entries.shape[0], *[1] * (z.ndim - 2), *entries.shape[1:])
    return _apply_diagonals(z, entries)


def transposed_core(core: Core) -> Core:
    """Core of ``M^T``; by diagonals it stays so: ``M^T[j, j + o] = M[j + o, j]``."""
    if core.dense:
        return Core(core.entries.mT, dense=True)
    off_diagonals = core.off_diagonals
    # What `roll` brings round from the other end are places outside the matrix, which hold zero.
    columns = [
        core.entries[..., off_diagonals - offset].roll(-offset, dims=-1)
        for offset in range(-off_diagonals, off_diagonals + 1)
    ]
    return Core(torch.stack(columns, dim=-1))


def fold_into_left(U: Tensor, core: Core) -> Tensor:
    """``U M`` (m, r) for ``U`` (m, r); (B, m, r) for a batch of cores. By diagonals no r x r matrix is formed."""
    if core.dense:
        return _einsum("mi,...ij->...mj", U, core.entries)
    return _apply_diagonals(U, transposed_core(core).entries[..., None, :, :])


def fold_into_right(core: Core, Vh: Tensor) -> Tensor:
    """``M V^T`` (r, n) for ``Vh`` (r, n); (B, r, n) for a batch of cores. By diagonals no r x r matrix is formed."""
    if core.dense:
        return _einsum("...ij,jn->...in", core.entries, Vh)
    rank, width, off_diagonals = core.rank, core.entries.shape[-1], core.off_diagonals
    padded = functional.pad(Vh, (0, 0, off_diagonals, off_diagonals))
    result = core.entries[..., 0, None] * padded[:rank]
    for shift in range(1, width):
        result = result + core.entries[..., shift, None] * padded[shift : shift + rank]
    return result


def core_update(U: Tensor, core: Core, Vh: Tensor) -> Tensor:
    """Dense update ``U M V^T`` (m, n) from ``U`` (m, r) and ``Vh`` (r, n); (B, m, n) for a batch of cores."""
    if U.shape[0] <= Vh.shape[1]:
        return _einsum("...mr,rn->...mn", fold_into_left(U, core), Vh)
    return _einsum("mr,...rn->...mn", U, fold_into_right(core, Vh))


def scaled_core(core: Core, strength: float | Tensor) -> Core:
    """Core of ``s M``; a ``strength`` (B,) makes a batch of one core."""
    if isinstance(strength, Tensor) and strength.ndim == 1:
        strength = strength[:, None, None]
    return Core(strength * core.entries, core.dense)


def sum_of_cores(cores: Sequence[Core]) -> Core:
    """Core of ``sum_a M_a`` over cores of one rank, dense if any of them is.

    Raises:
        ValueError: the cores have different ranks (see `embed_core`), or there are none.
    """
    alike = _alike(cores)
    total = alike[0].entries
    for core in alike[1:]:
        total = total + core.entries
    return Core(total, alike[0].dense)


def stack_cores(cores: Sequence[Core]) -> Core:
    """Batch of cores of one rank, entries (B, r, ...): the core of each sample; dense if any of them is.

    Raises:
        ValueError: the cores have different ranks (see `embed_core`), or there are none.
    """
    alike = _alike(cores)
    return Core(torch.stack([core.entries for core in alike]), alike[0].dense)


def embed_core(core: Core, triplets: slice | Tensor, size: int) -> Core:
    """The core over ``size`` triplets that is ``core`` on the ``triplets`` it belongs to, and zero elsewhere.

    ``triplets`` is a slice without steps or distinct indices (r,) int64. By diagonals it stays so for a slice, and
    for a diagonal core at any triplets; else the result is dense.

    Raises:
        ValueError: ``triplets`` are not as many as the core has, or the slice has steps.
    """
    rank = core.rank
    if isinstance(triplets, slice):
        first, last, step = triplets.indices(size)
        if step != 1 or last - first != rank:
            raise ValueError(f"a core of rank {rank} does not fit triplets {first}:{last}:{step}")
        after = size - last
        around = (first, after, first, after) if core.dense else (0, 0, first, after)
        return Core(functional.pad(core.entries, around), core.dense)
    if triplets.shape != (rank,):
        raise ValueError(f"a core of rank {rank} does not fit {tuple(triplets.shape)} triplets")
    dense = core.dense or core.off_diagonals > 0
    entries = core_matrix(core) if dense else core.entries
    if dense:
        wide = entries.new_zeros(*entries.shape[:-1], size)
        entries = wide.index_copy(-1, triplets, entries)
    tall = entries.new_zeros(*entries.shape[:-2], size, entries.shape[-1])
    return Core(tall.index_copy(-2, triplets, entries), dense)


def _apply_diagonals(z: Tensor, entries: Tensor) -> Tensor:
    """``y_i = sum_o M[i, i+o] z_{i+o}`` for ``z`` (..., r) and ``entries`` (..., r, 2d+1) that broadcast."""
    rank, width = entries.shape[-2:]
    off_diagonals = (width - 1) // 2
    padded = functional.pad(z, (off_diagonals, off_diagonals)) if off_diagonals else z
    result = padded[..., :rank] * entries[..., 0]
    for shift in range(1, width):
        result = result + padded[..., shift : shift + rank] * entries[..., shift]
    return result


def _alike(cores: Sequence[Core]) -> list[Core]:
    """The same cores, all dense or all with the same number of off-diagonals."""
    ranks = sorted({core.rank for core in cores})
    if len(ranks) != 1:
        raise ValueError(f"cores of one rank are needed, got ranks {ranks}")
    if any(core.dense for core in cores):
        return [Core(core_matrix(core), dense=True) for core in cores]
    width = max(core.entries.shape[-1] for core in cores)
    sides = [(width - core.entries.shape[-1]) // 2 for core in cores]
    return [
        Core(functional.pad(core.entries, (side, side)) if side else core.entries)
        for core, side in zip(cores, sides, strict=True)
    ]


def _einsum(equation: str, first: Tensor, second: Tensor) -> Tensor:
    """Product in the wider dtype of the two, also under autocast."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    with torch.autocast(first.device.type, enabled=False):
        return torch.einsum(equation, first.to(dtype), second.to(dtype))
