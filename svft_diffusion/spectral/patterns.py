"""Sparsity patterns: which entries of the core matrix ``M`` (n, n) train (SVFT, arXiv 2405.19597, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from svft_diffusion.spectral.portable_random import random_subset


def number_of_banded_positions(n: int, off_diagonals: int) -> int:
    """``|Omega| = n(2d+1) - d(d+1)`` for ``d`` off-diagonals on each side of the diagonal of an n x n matrix.

    The random and the top-k pattern are given the same budget, here as in the authors' code.
    """
    return n * (2 * off_diagonals + 1) - off_diagonals * (off_diagonals + 1)


def banded_positions(n: int, off_diagonals: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Rows and columns, each (|Omega|,) int64, of the entries with ``|i - j| <= off_diagonals``, row by row.

    ``off_diagonals = 0`` is the plain (diagonal) pattern.

    Raises:
        ValueError: the matrix has no such off-diagonal.
    """
    if not 0 <= off_diagonals < n:
        raise ValueError(f"off_diagonals must lie between 0 and {n - 1} for {n} singular values, got {off_diagonals}")
    # By arithmetic rather than a mask: shapes that depend on no data wait for no device and fit in a compiled graph.
    rows = torch.arange(n, device=device)
    first = (rows - off_diagonals).clamp(min=0)
    in_row = (rows + off_diagonals).clamp(max=n - 1) - first + 1
    ends = in_row.cumsum(0)
    place = torch.arange(number_of_banded_positions(n, off_diagonals), device=device)
    row = torch.searchsorted(ends, place, right=True)
    return row, place - (ends - in_row - first)[row]


def random_positions(n: int, count: int, seed: int) -> Tensor:
    """Random pattern: flat indices ``row * n + column``, (count,) int32, distinct and ascending.

    Uniform without replacement, and the same everywhere for one ``seed``. The authors' code draws with replacement,
    so that some entries are held twice and fewer than ``|Omega|`` are free.

    Raises:
        ValueError: the matrix has fewer entries.
    """
    return random_subset(n * n, count, f"positions of {n} x {n}, seed {seed}").int()


def top_k_positions(U: Tensor, Vh: Tensor, count: int) -> Tensor:
    """Top-k pattern: where ``|u_i^T v_j|`` is largest, (count,) int32 flat indices ``i * k + j``, distinct, ascending.

    ``U`` is (m, k) and ``Vh`` (k, n). The paper defines the pattern for square weights. For others the shorter
    vectors are continued with zeros, which takes the smaller space as the first coordinates of the larger one; for
    square weights that changes nothing. Of equal entries the lower index is taken. (The authors' code ranks the
    signed entries of ``U V``, and of ``U`` or ``V`` alone for weights that are not square.)

    Raises:
        ValueError: the core matrix has fewer entries.
    """
    rank = U.shape[1]
    if not 1 <= count <= rank * rank:
        raise ValueError(f"count must lie between 1 and {rank * rank} for {rank} singular triplets, got {count}")
    shared = min(U.shape[0], Vh.shape[1])
    alignment = (Vh[:, :shared] @ U[:shared]).T.abs().flatten()
    smallest_taken = alignment.topk(count, sorted=True).values[-1]
    taken = alignment > smallest_taken
    equal = (alignment == smallest_taken).nonzero().flatten()
    taken[equal[: count - int(taken.sum())]] = True
    return taken.nonzero().flatten().int()
