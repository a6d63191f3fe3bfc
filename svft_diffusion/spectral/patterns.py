"""Sparsity patterns: which entries of the core matrix ``M`` (n, n) train (SVFT, arXiv 2405.19597, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def number_of_banded_positions(n: int, off_diagonals: int) -> int:
    """``|Omega| = n(2d+1) - d(d+1)`` for ``d`` off-diagonals on each side of the diagonal of an n x n matrix."""
    return n * (2 * off_diagonals + 1) - off_diagonals * (off_diagonals + 1)


def banded_positions(n: int, off_diagonals: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Rows and columns, each (|Omega|,) int64, of the entries with ``|i - j| <= off_diagonals``, row by row.

    ``off_diagonals = 0`` is the plain (diagonal) pattern.

    Raises:
        ValueError: the matrix has no such off-diagonal.
    """
    if not 0 <= off_diagonals < n:
        raise ValueError(f"off_diagonals must lie between 0 and {n - 1} for {n} singular values, got {off_diagonals}")
    row = torch.arange(n, device=device)[:, None].expand(n, 2 * off_diagonals + 1)
    column = row + torch.arange(-off_diagonals, off_diagonals + 1, device=device)
    inside = (column >= 0) & (column < n)
    return row[inside], column[inside]
