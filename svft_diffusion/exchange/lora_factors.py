"""LoRA factors of an update ``U M V^T`` in closed form: only the core matrix ``M`` is ever decomposed.

``U`` and ``V`` have orthonormal columns. So with ``M = P diag(s) Q^T``, the singular value decomposition of the update
is ``(U P) diag(s) (V Q)^T``, and the best update of rank r (Eckart and Young, 1936) keeps the r largest ``s_i``:
``B = U P_r sqrt(s_r)`` and ``A = sqrt(s_r) Q_r^T V^T``. Its error in the Frobenius norm is that of the dropped ``s_i``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from svft_diffusion.spectral import Core, core_matrix

# Singular values below this part of the largest one are rounding; what they add to an update is below float32's.
_RELATIVE_ZERO = 1e-8


class CoreFactors(NamedTuple):
    """``M = P diag(s) Q^T`` on the rows and columns of ``M`` that hold anything but zeros.

    Attributes:
        rows: triplets that the rows of ``P`` stand for, (a,) int64.
        P: left singular vectors, (a, q) float64; for a diagonal ``M`` the signs (a,), one for each ``s_i``.
        s: all singular values of ``M`` that are not zero, descending, (rank of M,) float64. ``q`` may be less.
        Qh: right singular vectors, (q, b) float64; None for a diagonal ``M``, whose ``Q`` has ones where ``P`` has
            signs.
        columns: triplets that the columns of ``Qh`` stand for, (b,) int64.
    """

    rows: Tensor
    P: Tensor
    s: Tensor
    Qh: Tensor | None
    columns: Tensor

    @property
    def rank(self) -> int:
        """Rank of ``M``, and of the update."""
        return len(self.s)

    def dropped(self, rank: int) -> float:
        """Frobenius norm of what a LoRA of this rank lacks of the update."""
        return float(self.s[rank:].norm())


def decompose_core(core: Core, *, largest_rank: int | None = None) -> CoreFactors:
    """Decompose one core matrix; vectors are kept for the ``largest_rank`` largest singular values, or for all.

    A diagonal ``M`` needs no decomposition: its singular values are ``|m_i|``. Any other one is decomposed in float64
    on the block of rows and columns that are not zero.
    """
    if not core.dense and core.off_diagonals == 0:
        return _of_diagonal(core.entries[:, 0], largest_rank)
    matrix = core_matrix(core)
    rows = matrix.any(1).nonzero()[:, 0]
    columns = matrix.any(0).nonzero()[:, 0]
    if not len(rows):
        return _of_diagonal(matrix.diagonal(), largest_rank)
    P, s, Qh = torch.linalg.svd(matrix[rows][:, columns].double(), full_matrices=False)
    s = s[s > _RELATIVE_ZERO * s[0]]
    kept = len(s) if largest_rank is None else min(len(s), largest_rank)
    return CoreFactors(rows, P[:, :kept], s, Qh[:kept], columns)


def lora_factors(U: Tensor, core: CoreFactors, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``B`` (m, rank) and ``A`` (rank, n) with ``B A`` the best update of this rank; padded with zeros beyond M's rank.

    ``U`` (m, r) and ``Vh`` (r, n) are the triplets that the core matrix stands on. Both factors are float64: whoever
    writes them rounds them once.
    """
    kept = min(rank, core.rank)
    root = core.s[:kept].sqrt()
    if core.Qh is None:
        order = core.rows[:kept]
        B = U[:, order].double() * (core.P[:kept] * root)
        A = root[:, None] * Vh[order].double()
    else:
        B = U[:, core.rows].double() @ core.P[:, :kept] * root
        A = root[:, None] * (core.Qh[:kept] @ Vh[core.columns].double())
    return functional.pad(B, (0, rank - kept)), functional.pad(A, (0, 0, 0, rank - kept))


def rounding_error(s: Tensor, B: Tensor, A: Tensor, rounded_B: Tensor, rounded_A: Tensor) -> float:
    """Frobenius norm of ``B A`` less the product of the rounded factors, for ``B`` and ``A`` of `lora_factors`.

    The columns of ``B`` and the rows of ``A`` are orthogonal, of norms ``sqrt(s_i)``. So to first order in the
    rounding its square is the sum of ``s_i (|db_i|^2 + |da_i|^2)``, and no product is formed. What the rank drops is
    orthogonal to it.
    """
    db = (rounded_B.double() - B).square().sum(0)
    da = (rounded_A.double() - A).square().sum(1)
    kept = min(len(db), len(s))
    return float((s[:kept] * (db[:kept] + da[:kept])).sum().sqrt())


def smallest_rank(cores: list[CoreFactors], tolerance: float) -> int:
    """The smallest common rank at which the relative error of all updates together is below ``tolerance``."""
    longest = max(core.rank for core in cores)
    squares = torch.stack([functional.pad(core.s.square(), (0, longest - core.rank)) for core in cores]).sum(0)
    dropped = squares.flip(0).cumsum(0).flip(0)  # dropped[r]: all squares from the r-th on
    enough = (dropped < tolerance**2 * dropped[0]).nonzero()
    return int(enough[0, 0]) if len(enough) else longest


def _of_diagonal(values: Tensor, largest_rank: int | None) -> CoreFactors:
    s, order = values.double().abs().sort(descending=True, stable=True)
    rank = int((s > _RELATIVE_ZERO * s[0]).sum())
    kept = rank if largest_rank is None else min(rank, largest_rank)
    return CoreFactors(order[:kept], values[order[:kept]].double().sign(), s[:rank], None, order[:kept])
