"""The core matrix ``M`` of an update ``U M V^T``, kept by its diagonals.

A core with ``d`` off-diagonals on each side is a tensor (r, 2d+1): entry ``[i, d + o]`` is ``M[i, i + o]``, and
places outside the matrix hold zero. ``r`` is the number of leading singular triplets that the update may touch.
A diagonal ``M`` is the case d = 0. No function but `core_matrix` and `core_update` forms a dense matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def apply_core(z: Tensor, core: Tensor) -> Tensor:
    """``z M^T`` for ``z`` (..., r): ``y_i = sum_o M[i, i+o] z_{i+o}``, one elementwise product for each diagonal.

    In 16 bit, ``z`` is promoted to the dtype of the core: small entries of ``M`` would be lost otherwise.
    """
    rank, width = core.shape
    off_diagonals = (width - 1) // 2
    if off_diagonals == 0:
        return z * core[:, 0]
    padded = functional.pad(z, (off_diagonals, off_diagonals))
    result = padded[..., 0:rank] * core[:, 0]
    for shift in range(1, width):
        result = result + padded[..., shift : shift + rank] * core[:, shift]
    return result


def core_matrix(core: Tensor) -> Tensor:
    """The dense ``M`` (r, r) of a core (r, 2d+1)."""
    rank, width = core.shape
    off_diagonals = (width - 1) // 2
    matrix = core.new_zeros(rank, rank)
    for offset in range(-off_diagonals, off_diagonals + 1):
        first, last = max(0, -offset), min(rank, rank - offset)
        matrix = matrix + torch.diag(core[first:last, off_diagonals + offset], offset)
    return matrix


def core_update(U: Tensor, core: Tensor, Vh: Tensor) -> Tensor:
    """Dense update ``U_r M V_r^T`` (m, n) from ``U`` (m, k), a core (r, 2d+1) with r <= k, ``Vh`` (k, n)."""
    rank = core.shape[0]
    return U[:, :rank] @ core_matrix(core) @ Vh[:rank]


def sum_of_cores(cores: Sequence[Tensor]) -> Tensor:
    """Core of ``sum_a M_a``: cores with fewer singular triplets or fewer off-diagonals are padded with zeros."""
    if len(cores) == 1:
        return cores[0]
    rank = max(core.shape[0] for core in cores)
    width = max(core.shape[1] for core in cores)
    total = cores[0].new_zeros(rank, width)
    for core in cores:
        side = (width - core.shape[1]) // 2
        total = total + functional.pad(core, (side, side, 0, rank - core.shape[0]))
    return total
