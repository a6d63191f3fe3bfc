"""What the kernels of linear layers and of convolutions have in common: the core ``M`` and the gradient of its entries.

With ``a = x V`` (T, r) and ``b = g U`` (T, r), for the gradient ``g`` of the output: ``dL/dM = b^T a``. Of it only the
entries that train are computed, and no matrix of the size of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from svft_diffusion.kernels.compression import KeptActivation, parts_of
from svft_diffusion.spectral.core import Core, diagonal_core, sum_of_cores

# Rows of one block along the diagonal: narrow blocks waste little outside the band, wide ones multiply faster.
BLOCK = 32


def shifted_spectrum(S: Tensor, core: Core) -> Core:
    """Core of ``Sigma + M``, in the dtype of the core."""
    return sum_of_cores([core, diagonal_core(S.to(core.entries.dtype))])


def core_into_smaller(z: Tensor, core: Core, factor: Tensor, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """``z M F``, or ``z M^T F``, as two matrices (T, r) and (r, p) that are still to be multiplied.

    The core goes into the smaller of ``z`` (T, r) and ``F`` (r, p).
    """
    if z.shape[0] < factor.shape[1]:
        return times_core(z, core, transposed=transposed), factor
    return z, times_core(factor.mT, core, transposed=not transposed).mT


def times_core(z: Tensor, core: Core, *, transposed: bool = False) -> Tensor:
    """``z M``, or ``z M^T``, for ``z`` (T, r) and in its dtype; by diagonals it is computed in that of the core.

    Without autograd it may add in place, which takes a fraction of the time of `fold_into_left` and `apply_core`.
    """
    if core.dense:
        matrix = core.entries.to(z.dtype)
        return z @ (matrix.mT if transposed else matrix)
    rank, off_diagonals = core.rank, core.off_diagonals
    wide = z.to(core.entries.dtype)
    diagonals = core.entries.mT.contiguous()
    product = wide * diagonals[off_diagonals]
    for offset in range(-off_diagonals, off_diagonals + 1):
        first, last = max(0, -offset), min(rank, rank - offset)
        if offset == 0 or first >= last:
            continue
        rows, columns = slice(first, last), slice(first + offset, last + offset)
        source, target = (columns, rows) if transposed else (rows, columns)
        product[:, target].addcmul_(wide[:, source], diagonals[off_diagonals + offset, rows])
    return product.to(z.dtype)


def core_gradient(a: KeptActivation, b: Tensor, core: Core) -> Tensor:
    """Gradient of ``core.entries``, in its shape and dtype, from the kept ``a`` (T, r) and from ``b`` (T, r)."""
    gradient = torch.zeros_like(core.entries)
    for part in parts_of(b):
        gradient += _gradient_of_part(a[part].restored(b.dtype), b[part], core)
    return gradient


def gradient_through_weight(G: Tensor, U: Tensor, Vh: Tensor, core: Core) -> Tensor:
    """Gradient of ``core.entries`` from that of the weight, ``G`` (m, n): what trains of ``U^T G V``."""
    if G.shape[0] <= G.shape[1]:
        return core_gradient(KeptActivation(G @ Vh.mT), U, core)
    return core_gradient(KeptActivation(Vh.mT), G.mT @ U, core)


def _gradient_of_part(a: Tensor, b: Tensor, core: Core) -> Tensor:
    if core.dense:
        return b.mT @ a
    if core.off_diagonals == 0:
        return (a * b.to(core.entries.dtype)).sum(dim=0)[:, None]
    return _banded_gradient(a, b, core.off_diagonals)


def _banded_gradient(a: Tensor, b: Tensor, off_diagonals: int) -> Tensor:
    """``[i, d + o] = sum_t b_ti a_t,i+o`` (r, 2d+1): products of blocks along the diagonal, and their diagonals."""
    rank = a.shape[1]
    blocks = -(-rank // BLOCK)
    spare = blocks * BLOCK - rank
    width = BLOCK + 2 * off_diagonals
    a_blocks = functional.pad(a, (off_diagonals, off_diagonals + spare)).unfold(1, width, BLOCK).transpose(0, 1)
    b_blocks = functional.pad(b, (0, spare)).unflatten(1, (blocks, BLOCK)).permute(1, 2, 0)
    products = torch.bmm(b_blocks, a_blocks)  # (blocks, BLOCK, width), of which [:, i, i + d + o] is wanted
    diagonals = [products.diagonal(shift, dim1=1, dim2=2) for shift in range(2 * off_diagonals + 1)]
    return torch.stack(diagonals, dim=-1).flatten(0, 1)[:rank]
