"""Four numbers by which to recognise an update ``Delta W = U M V^T`` on another machine.

They are bilinear forms ``a_j^T Delta W b_j`` with fixed vectors ``a_j``, ``b_j`` of +1 and -1. The mean square of one
over all such vectors is the squared Frobenius norm of its matrix, so that their relative disagreement estimates the
relative error of ``Delta W``. The update itself (m, n) is never formed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svft_diffusion.spectral.core import Core, apply_core
from svft_diffusion.spectral.portable_random import project_columns

NUMBER_OF_PROBES = 4


def probe_update(U: Tensor, core: Core, Vh: Tensor) -> Tensor:
    """``a_j^T (U M V^T) b_j`` for four fixed pairs of vectors, (4,) float32, from ``U`` (m, r) and ``Vh`` (r, n)."""
    left = project_columns(U.detach(), NUMBER_OF_PROBES, "probe, left")
    right = project_columns(Vh.detach().T, NUMBER_OF_PROBES, "probe, right")
    exact_core = Core(core.entries.detach().double(), core.dense)
    return (left * apply_core(right, exact_core)).sum(dim=1).float()


def probe_error(stored: Tensor, found: Tensor) -> float:
    """Relative root-mean-square disagreement of probes (4,): 0 for equal ones, about 1.4 for unrelated updates.

    Relative to the larger of the two, so that it is defined where one is zero (then 1) or both are (then 0).
    Infinite where one of them is not finite.
    """
    stored, found = stored.detach().double().cpu(), found.detach().double().cpu()
    if not (torch.isfinite(stored).all() and torch.isfinite(found).all()):
        return math.inf
    scale = max(_root_mean_square(stored), _root_mean_square(found))
    return _root_mean_square(found - stored) / scale if scale > 0 else 0.0


def _root_mean_square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) / math.sqrt(values.numel())
