"""SVDiff: compact parameter space for diffusion fine-tuning (Han et al., ICCV 2023, arXiv 2303.11305)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svft_diffusion.spectral.core import core_update
from svft_diffusion.spectral.decomposition import SingularFactors


def spectral_shift(sigma: Tensor, deltas: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
    """What the shifts change in the spectrum: ``relu(sigma + sum_a s_a delta_a) - sigma`` (Eq. 2 and 4), shape (r,).

    ``sigma`` (k,) holds the singular values and every ``delta_a`` (r_a,) shifts the leading ``r_a`` of them;
    ``r`` is the largest ``r_a``. Computed as ``max(sum_a s_a delta_a, -sigma)``, which is the same number without
    the rounding of a small shift against a large singular value, and exactly zero for zero shifts.
    """
    rank = max(len(delta) for delta in deltas)
    total = deltas[0].new_zeros(rank)
    for delta, strength in zip(deltas, strengths, strict=True):
        total = total + strength * torch.nn.functional.pad(delta, (0, rank - len(delta)))
    return torch.clamp(total, min=-sigma[:rank].to(total.dtype))


def svdiff_update(factors: SingularFactors, delta: Tensor, strength: float = 1.0) -> Tensor:
    """``Delta W = U diag(relu(sigma + s delta) - sigma) V^T`` (Eq. 2), shape (m, n)."""
    shift = spectral_shift(factors.S, [delta], [strength])
    return core_update(factors.U, shift[:, None], factors.Vh)
