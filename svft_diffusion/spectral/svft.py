"""SVFT: singular-vector guided fine-tuning (Lingam et al., NeurIPS 2024, arXiv 2405.19597)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from svft_diffusion.spectral.core import core_update
from svft_diffusion.spectral.decomposition import SingularFactors
from svft_diffusion.spectral.patterns import banded_positions


def banded_core(values: Tensor, rank: int, off_diagonals: int) -> Tensor:
    """Core (r, 2d+1) of the banded ``M`` whose entries ``values`` (|Omega|,) are listed row by row.

    ``off_diagonals = 0`` is SVFT's plain pattern. The order of ``values`` is that of `banded_positions`, which is
    also the order of the authors' code.
    """
    if off_diagonals == 0:
        return values[:, None]
    width = 2 * off_diagonals + 1
    slots = _slots_of_band(rank, off_diagonals, values.device)
    return values.new_zeros(rank * width).scatter(0, slots, values).view(rank, width)


@lru_cache(maxsize=64)
def _slots_of_band(rank: int, off_diagonals: int, device: torch.device) -> Tensor:
    """Where in the flattened core (r * (2d+1)) each value of the band goes; one tensor for all layers of a size."""
    with torch.inference_mode(False):  # the tensor outlives a call in inference mode and may serve training next
        rows, columns = banded_positions(rank, off_diagonals, device=device)
        return rows * (2 * off_diagonals + 1) + (columns - rows + off_diagonals)


def svft_update(factors: SingularFactors, values: Tensor, off_diagonals: int, rank: int | None = None) -> Tensor:
    """``Delta W = U M V^T = sum over (i,j) in Omega of m_ij u_i v_j^T`` (section 3), shape (m, n).

    ``rank`` keeps the leading singular triplets only; all of them when it is None.
    """
    kept = len(factors.S) if rank is None else rank
    return core_update(factors.U, banded_core(values, kept, off_diagonals), factors.Vh)
