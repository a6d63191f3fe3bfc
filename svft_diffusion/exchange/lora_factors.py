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
        P: left singular vectors, (a, q) float32; for a diagonal ``M`` the signs (a,), one for each ``s_i``.
        s: all singular values of ``M`` that are not zero, descending, (rank of M,) float64. ``q`` may be less.
        Qh: right singular vectors, (q, b) float32; None for a diagonal ``M``, whose ``Q`` has ones where ``P`` has
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
    return CoreFactors(rows, P[:, :kept].float(), s, Qh[:kept].float(), columns)


def lora_factors(U: Tensor, core: CoreFactors, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``B`` (m, rank) and ``A`` (rank, n) with ``B A`` the best update of this rank; padded with zeros beyond M's rank.

    ``U`` (m, r) and ``Vh`` (r, n) are the triplets that the core matrix stands on.
    """
    kept = min(rank, core.rank)
    root = core.s[:kept].sqrt().to(U.dtype)
    if core.Qh is None:
        order = core.rows[:kept]
        B = U[:, order] * (core.P[:kept].to(U.dtype) * root)
        A = root[:, None] * Vh[order]
    else:
        B = U[:, core.rows] @ core.P[:, :kept].to(U.dtype) * root
        A = root[:, None] * (core.Qh[:kept].to(Vh.dtype) @ Vh[core.columns])
    return functional.pad(B, (0, rank - kept)), functional.pad(A, (0, 0, 0, rank - kept))


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
    return CoreFactors(order[:kept], values[order[:kept]].sign(), s[:rank], None, order[:kept])
