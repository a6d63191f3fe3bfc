"""SVDiff: compact parameter space for diffusion fine-tuning (Han et al., ICCV 2023, arXiv 2303.11305)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from svft_diffusion.spectral.core import core_update, diagonal_core
from svft_diffusion.spectral.decomposition import SingularFactors


def spectral_shift(sigma: Tensor, deltas: Sequence[Tensor], strengths: Sequence[float | Tensor]) -> Tensor:
    """What the shifts change in the spectrum: ``relu(sigma + sum_a s_a delta_a) - sigma`` (Eq. 2 and 4), shape (r,).

    ``sigma`` (r,) holds the singular values and every ``delta_a`` (r_a,) shifts the leading ``r_a`` of them; ``r``
    of the result is the largest ``r_a``. Computed as ``max(sum_a s_a delta_a, -sigma)``, which is the same number
    without the rounding of a small shift against a large singular value, and exactly zero for zero shifts.
    """
    rank = max(len(delta) for delta in deltas)
    total = deltas[0].new_zeros(rank)
    for delta, strength in zip(deltas, strengths, strict=True):
        padded = delta if len(delta) == rank else functional.pad(delta, (0, rank - len(delta)))
        total = total + strength * padded
    return torch.clamp(total, min=-sigma[:rank].to(total.dtype))


def svdiff_update(factors: SingularFactors, delta: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    """``Delta W = U diag(relu(sigma + s delta) - sigma) V^T`` (Eq. 2), shape (m, n), for ``delta`` (r,), r <= k."""
    rank = len(delta)
    shift = spectral_shift(factors.S, [delta], [strength])
    return core_update(factors.U[:, :rank], diagonal_core(shift), factors.Vh[:rank])


def shifted_norm_weight(weight: Tensor, delta: Tensor, strength: float | Tensor) -> Tensor:
    """Weight of a norm layer with a shift for each entry, ``w + s delta``, both (c,): SVDiff as its authors have it.

    A 1-D weight has no spectrum; the paper shifts its entries directly and without the relu.
    """
    return weight + strength * delta


def rescaled_norm_weight(weight: Tensor, delta: Tensor, strength: float | Tensor) -> Tensor:
    """Weight of a norm layer with one shift for the layer, ``w relu(||w|| + s delta) / ||w||``, ``delta`` (1,).

    This is how the community package svdiff-pytorch reads Eq. 2 for a 1-D weight: as a 1 x c matrix, whose only
    singular value is ``||w||``. Computed as ``w + w max(s delta, -||w||) / ||w||``, so that a zero shift gives ``w``
    exactly. A zero weight has no direction to be rescaled in, and stays zero.
    """
    length = torch.linalg.vector_norm(weight.to(delta.dtype))
    change = torch.maximum(strength * delta, -length) / torch.where(length > 0, length, 1.0)
    return weight + weight * change
