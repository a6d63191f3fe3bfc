"""SiVA: singular value adaptation of the smallest singular values (OpenReview VpeAsLmcvg).

After its abstract and reviews; the paper gives no relu for the shift, and none is taken here.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from svft_diffusion.spectral.core import core_update, diagonal_core
from svft_diffusion.spectral.decomposition import SingularFactors
from svft_diffusion.spectral.portable_random import random_subset

TripletSelection = Literal["bottom", "top", "all", "random"]

# 0.1 * 30 is 3.0000000000000004 in floating point, and 3 triplets are meant.
_ROUNDING = 1e-9


def number_of_triplets(k: int, fraction: float) -> int:
    """``ceil(fraction * k)`` of ``k`` singular triplets, at least one.

    Raises:
        ValueError: the fraction lies outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie above 0 and not above 1, got {fraction}")
    return max(1, math.ceil(fraction * k - _ROUNDING))


def selected_triplets(k: int, fraction: float, select: TripletSelection, seed: int) -> slice | Tensor:
    """Which of ``k`` triplets train, singular values descending: a slice, or for random indices (r,) int64, ascending.

    ``bottom`` is SiVA; the others let its premise be tested. ``all`` pays no heed to ``fraction``. The random ones
    are drawn uniformly without replacement, the same everywhere for one ``seed``; the others pay no heed to it.

    Raises:
        ValueError: the fraction lies outside (0, 1], or there is no such selection.
    """
    count = number_of_triplets(k, fraction)
    match select:
        case "bottom":
            return slice(k - count, k)
        case "top":
            return slice(0, count)
        case "all":
            return slice(0, k)
        case "random":
            return random_subset(k, count, f"triplets of {k}, seed {seed}")
    raise ValueError(f"unknown selection {select!r}; choose from {', '.join(get_args(TripletSelection))}")


def siva_update(
    factors: SingularFactors, delta: Tensor, triplets: slice | Tensor, strength: float | Tensor = 1.0
) -> Tensor:
    """``Delta W = U_b diag(s delta) V_b^T``, shape (m, n), over the selected ``triplets``, ``delta`` (r,)."""
    return core_update(factors.U[:, triplets], diagonal_core(strength * delta), factors.Vh[triplets])


def effective_rank(sigma: Tensor) -> Tensor:
    """``exp(-sum_i p_i ln p_i)`` with ``p_i = sigma_i / sum_j sigma_j`` (Roy and Vetterli, EUSIPCO 2007), 0-dim.

    Between 1 (one direction) and k (all singular values equal); 0 for a zero matrix.
    """
    total = sigma.sum()
    shares = sigma / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, torch.special.entr(shares).sum().exp(), 0.0)
