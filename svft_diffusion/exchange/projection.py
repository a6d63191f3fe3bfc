"""Updates in the basis of a weight's singular vectors: ``dW`` to the entries of ``C = U^T dW V`` that a pattern has.

``U`` and ``V`` have orthonormal columns, so among all cores ``M`` with a given pattern the entries of ``C`` make the
nearest update ``U M V^T``, and the square of what is lost is ``||dW||^2 - ||M||^2``. All products run in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svft_diffusion.spectral import SingularFactors, banded_positions, number_of_banded_positions

# Rounding of the factors spoils the difference of squares where little is lost; there the difference is measured.
_MEASURED_BELOW = 0.03


class Entries(NamedTuple):
    """Entries of a core matrix (k, k) as an adapter keeps them."""

    values: Tensor  # (|Omega|,)
    rows: Tensor  # (|Omega|,) int64
    columns: Tensor  # (|Omega|,) int64
    listed: bool  # whether the adapter keeps their positions, or its pattern says where they are

    def positions(self, rank: int) -> Tensor | None:
        """Flat indices ``row * rank + column`` (int32) where the adapter lists them."""
        return (self.rows * rank + self.columns).int() if self.listed else None


class Projection(NamedTuple):
    """What an update becomes in the basis."""

    entries: Entries
    size: float  # ||dW||
    distance: float  # ||dW - U M V^T||


def project_product(factors: SingularFactors, B: Tensor, A: Tensor, *, pattern: str, off_diagonals: int) -> Projection:
    """Project ``dW = B A`` for ``B`` (m, r) and ``A`` (r, n), in closed form: ``C = (U^T B)(A V)``.

    No m x n matrix is formed, but for an update that lies in the pattern almost entirely, to measure what is lost;
    and the k x k matrix ``C`` only to find its largest entries.

    Args:
        pattern: ``plain``, ``banded`` with ``off_diagonals`` on each side, or ``random``: as many entries as a band
            with that number would have, the largest of all.
    """
    U, V = factors.U.double(), factors.Vh.double().T
    B, A = B.double(), A.double()
    left, right = U.T @ B, A @ V  # (k, r) and (r, k)
    if pattern == "random":
        entries = largest_entries(left @ right, number_of_banded_positions(len(left), off_diagonals))
    else:
        rows, columns = banded_positions(len(left), off_diagonals)
        entries = Entries((left[rows] * right.T[columns]).sum(-1), rows, columns, listed=False)
    size = size_of_product(B, A)
    distance = max(size**2 - float(entries.values.square().sum()), 0.0) ** 0.5
    if distance < _MEASURED_BELOW * size:
        distance = float((B @ A - update_of_entries(factors, entries)).norm())
    return Projection(entries, size, distance)


def size_of_product(B: Tensor, A: Tensor) -> float:
    """``||B A||`` for ``B`` (m, r) and ``A`` (r, n), through r x r or m x n numbers, whichever is less."""
    B, A = B.double(), A.double()
    if len(B) * A.shape[1] < len(A) ** 2:
        return float((B @ A).norm())
    return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())


def largest_entries(core: Tensor, count: int) -> Entries:
    """The ``count`` entries of ``core`` (k, k) that are largest in magnitude, in the order of their positions."""
    flat = core.flatten()
    positions = flat.abs().topk(count).indices.sort().values
    return Entries(flat[positions], positions // len(core), positions % len(core), listed=True)


def band_of(core: Tensor, off_diagonals: int) -> Entries:
    """The entries of ``core`` (k, k) on its diagonal and ``off_diagonals`` on each side, row by row."""
    rows, columns = banded_positions(len(core), off_diagonals)
    return Entries(core[rows, columns], rows, columns, listed=False)


def update_of_entries(factors: SingularFactors, entries: Entries) -> Tensor:
    """``U M V^T`` (m, n) in float64."""
    rank = len(factors.S)
    core = torch.zeros(rank, rank, dtype=torch.float64)
    core[entries.rows, entries.columns] = entries.values
    update: Tensor = factors.U.double() @ core @ factors.Vh.double()
    return update
