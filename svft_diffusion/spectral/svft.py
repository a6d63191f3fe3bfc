"""SVFT: singular-vector guided fine-tuning (Lingam et al., NeurIPS 2024, arXiv 2405.19597)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from svft_diffusion.spectral.core import Core, core_update, diagonal_core
from svft_diffusion.spectral.decomposition import SingularFactors
from svft_diffusion.spectral.patterns import banded_positions


def banded_core(values: Tensor, rank: int, off_diagonals: int) -> Core:
    """Banded ``M`` (section 3) whose entries ``values`` (|Omega|,) are listed row by row; kept by its diagonals.

    ``off_diagonals = 0`` is SVFT's plain pattern. The order of ``values`` is that of `banded_positions`, which is
    also the order of the authors' code.
    """
    if off_diagonals == 0:
        return diagonal_core(values)
    width = 2 * off_diagonals + 1
    # A compiled graph holds the slots as a constant and needs no cache.
    slots_of_band = _slots_of_band if torch.compiler.is_compiling() else _cached_slots_of_band
    slots = slots_of_band(rank, off_diagonals, values.device)
    return Core(values.new_zeros(rank * width).scatter(0, slots, values).view(rank, width))


def sparse_core(values: Tensor, positions: Tensor, rank: int) -> Core:
    """``M`` (r, r) of the random and top-k patterns (section 3): ``values`` (|Omega|,) at ``positions``, else zero.

    ``positions`` (|Omega|,) are distinct flat indices ``row * r + column`` of any integer dtype. Kept dense.
    """
    return Core(values.new_zeros(rank * rank).scatter(0, positions.long(), values).view(rank, rank), dense=True)


def gated_values(values: Tensor, gate: Tensor) -> Tensor:
    """``sigmoid(g) m`` for ``values`` (|Omega|,) and one trained ``gate`` (1,) a layer, as in the authors' code."""
    return torch.sigmoid(gate) * values


def official_initial_values(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Start of the authors' code, ``m ~ N(0, 2/|Omega|)`` (Kaiming), shape (|Omega|,); its gate starts at zero.

    So training starts off the base: by ``||Delta W||_F = sigmoid(0) sqrt(2) = 0.71`` on average, whatever the layer.
    """
    return torch.randn(count, generator=generator) * math.sqrt(2 / count)


def svft_update(factors: SingularFactors, core: Core) -> Tensor:
    """``Delta W = U M V^T = sum over (i,j) in Omega of m_ij u_i v_j^T`` (section 3), shape (m, n).

    ``core`` acts on the leading ``r`` singular triplets. What is left out of a truncated rank stays in the weight,
    unlike in the authors' code, which drops it.
    """
    return core_update(factors.U[:, : core.rank], core, factors.Vh[: core.rank])


def _slots_of_band(rank: int, off_diagonals: int, device: torch.device) -> Tensor:
    """Where in the flattened core (r * (2d+1)) each value of the band goes."""
    rows, columns = banded_positions(rank, off_diagonals, device=device)
    return rows * (2 * off_diagonals + 1) + (columns - rows + off_diagonals)


@lru_cache(maxsize=64)
def _cached_slots_of_band(rank: int, off_diagonals: int, device: torch.device) -> Tensor:
    """The same, one tensor for all layers of a size."""
    with torch.inference_mode(False):  # the tensor outlives a call in inference mode and may serve training next
        return _slots_of_band(rank, off_diagonals, device)
