"""Singular value decomposition that gives the same factors wherever it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

# Part of the key of every stored decomposition: raise it whenever `decompose` may give other numbers than before.
ALGORITHM_VERSION = 1

# Entries of a singular vector this close (relative) to its largest one count as equally large. Without it, two
# entries that are equal but for rounding would decide the sign by chance.
_TIE_TOLERANCE = 1e-4


class SingularFactors(NamedTuple):
    """Thin factors ``W = U diag(S) Vh`` with ``k = min(m, n)``, singular values descending, in float32."""

    U: Tensor  # (m, k)
    S: Tensor  # (k,)
    Vh: Tensor  # (k, n)

    def to(self, device: torch.device) -> SingularFactors:
        """The same factors on ``device``."""
        return SingularFactors(self.U.to(device), self.S.to(device), self.Vh.to(device))


def decompose(weight: Tensor) -> SingularFactors:
    """Singular factors of a weight ``W`` (m, n) of any floating dtype, on the CPU in float32.

    The decomposition itself runs in float64, on one thread and always on the tall orientation, so that ``W`` and
    ``W^T`` share their factors and rounding of the driver stays below float32. The joint sign of each pair
    ``(u_i, v_i)``, which the decomposition leaves open, is settled by `canonical_signs`. May be called from several
    threads at once.

    A weight on a CUDA device is decomposed there (written after the documentation, not run on one yet). Its factors
    should agree with those of the CPU up to the last bits, but for rotations among (nearly) equal singular values
    (see `spectral.basis_sketch`).

    The eigenvectors of the Gram matrix ``W^T W`` in float64, followed by one QR, rebuild ``W`` as well, but save no
    more than a fifth of the time for some shapes and cost more for others, and the vectors of small singular values
    lose digits: their gaps are squared.

    Raises:
        ValueError: the weight is not a matrix, lies on the meta device, or holds NaN or infinity.
    """
    if weight.ndim != 2:
        raise ValueError(f"expected a matrix, got a tensor of shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError("the weight has no values yet (it lies on the meta device)")
    matrix = weight.detach()
    matrix = matrix.double() if matrix.is_cuda else matrix.to(device="cpu", dtype=torch.float64)
    if not torch.isfinite(matrix).all():
        raise ValueError("the weight holds NaN or infinite values")
    wide = matrix.shape[0] < matrix.shape[1]
    with _one_thread():
        left, sigma, right = torch.linalg.svd(matrix.T if wide else matrix, full_matrices=False)
    U, Vh = (right.T, left.T) if wide else (left, right)
    signs = canonical_signs(U)
    return SingularFactors(
        U=(U * signs).float().contiguous().cpu(),
        S=sigma.float().contiguous().cpu(),
        Vh=(Vh * signs[:, None]).float().contiguous().cpu(),
    )


def canonical_signs(U: Tensor) -> Tensor:
    """Signs (k,) that make the largest entry (in magnitude) of every column ``u_i`` of ``U`` (m, k) positive.

    Among entries that are equally large up to rounding the first one decides.
    """
    magnitude = U.abs()
    largest = magnitude.amax(dim=0)
    deciding_row = (magnitude >= (1 - _TIE_TOLERANCE) * largest).to(torch.uint8).argmax(dim=0)
    deciding_entry = U.gather(0, deciding_row[None]).squeeze(0)
    return torch.where(deciding_entry < 0, -1.0, 1.0).to(U.dtype)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Splits no sum over threads: the order of additions, and with it the last bits, would depend on their number.

    Every thread has its own number of threads, and begins with the one that any thread has set last: one that is
    started meanwhile begins with one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
