"""VectorFit: adaptive singular and bias vector fine-tuning (Hegde et al., arXiv 2503.19530).

The method trains the singular values and the existing biases, as shifts from their pretrained values here, which is
the same function and leaves weight decay a pull towards the base. The formulas of Adaptive Vector Freezing are
"after VectorFit": the authors have released no code, and the paper's text leaves them open in part. A *vector* is all
that trains of one kind in one layer: its singular values or its bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svft_diffusion.spectral.core import core_update, diagonal_core
from svft_diffusion.spectral.decomposition import SingularFactors


def vectorfit_update(factors: SingularFactors, delta: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    """``Delta W = U diag(s Delta Sigma) V^T``, shape (m, n), for ``delta`` (r,), r <= k: no relu, unlike SVDiff."""
    rank = len(delta)
    return core_update(factors.U[:, :rank], diagonal_core(strength * delta), factors.Vh[:rank])


def training_strength(vector: Tensor, initial: Tensor | float = 0.0) -> Tensor:
    """``S_v(t) = mean_i |v_i(t) - v_i(0)|``, how far a vector has moved; 0-dim.

    For a vector that is kept as a shift, ``initial`` is zero.
    """
    return (vector - initial).abs().mean()


def smoothed_strength(previous: Tensor, strength: Tensor, beta: float) -> Tensor:
    """Moving average ``beta S_v(t-1) + (1 - beta) S_v(t)`` of training strengths, of any one shape."""
    return beta * previous + (1 - beta) * strength


def strongest_vectors(strengths: Tensor, top_k: int) -> Tensor:
    """Which vectors to freeze: indices of the ``top_k`` largest ``strengths`` (v,), int64, ascending.

    Of equally strong vectors the first is taken; all of them are where there are fewer than ``top_k``.

    Raises:
        ValueError: ``top_k`` is negative.
    """
    if top_k < 0:
        raise ValueError(f"top_k must not be negative, got {top_k}")
    return torch.sort(strengths, descending=True, stable=True).indices[:top_k].sort().values
