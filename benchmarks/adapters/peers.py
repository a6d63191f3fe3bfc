"""The published layers, re-derived from their formulas: what their code computes, without their packages.

`mkshing/svdiff-pytorch` pins a diffusers of 2023 and the official SVFT needs `torch_sparse`, so neither can run beside
current libraries. The layers below do the same matrix products in the same order. Where a shortcut was taken it
makes the published code quicker, never slower: no decomposition at the first forward, and a row scaling where the
official SVFT multiplies by a sparse matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from svft_diffusion.spectral import SingularFactors


class _Decomposed(nn.Module):
    """Keeps ``U`` and ``Vh`` in the dtype of the model, the singular values in float32, and the frozen bias."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    bias: Tensor | None

    def __init__(self, base: nn.Linear | nn.Conv2d, factors: SingularFactors) -> None:
        super().__init__()
        self.register_buffer("U", factors.U.to(base.weight))
        self.register_buffer("S", factors.S.to(base.weight.device))
        self.register_buffer("Vh", factors.Vh.to(base.weight))
        self.bias = base.bias


class CommunitySVDiffLinear(_Decomposed):
    """SVDiff's linear layer in svdiff-pytorch: ``y = U diag(relu(S + delta)) V^T x + b``, rebuilt in every forward.

    The diagonal matrix is dense there, so that rebuilding costs two full matrix products.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, factors: SingularFactors) -> None:
        super().__init__(base, factors)
        self.delta = nn.Parameter(torch.zeros_like(self.S))

    def weight(self) -> Tensor:
        """``W_delta`` (m, n) in the dtype of the model."""
        shifted = functional.relu(self.S + self.delta).to(self.U.dtype)
        return self.U @ torch.diag(shifted) @ self.Vh

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight(), self.bias)


class CommunitySVDiffConv2d(CommunitySVDiffLinear):
    """SVDiff's convolution in svdiff-pytorch: the kernel, reshaped to (c_out, c_in h w), rebuilt in every forward."""

    def __init__(self, base: nn.Conv2d, factors: SingularFactors) -> None:
        super().__init__(base, factors)
        self.shape = base.weight.shape
        self.options = {name: getattr(base, name) for name in ("stride", "padding", "dilation", "groups")}

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight().view(self.shape), self.bias, **self.options)


class OfficialSVFTLinear(_Decomposed):
    """The official SVFT layer with the plain pattern: ``y = x (U (S + sigmoid(gate) M) V^T)^T + b``.

    The dense weight is rebuilt in every forward and the frozen weight itself is not used.
    """

    def __init__(self, base: nn.Linear, factors: SingularFactors) -> None:
        super().__init__(base, factors)
        self.values = nn.Parameter(torch.zeros_like(self.S))
        self.gate = nn.Parameter(torch.zeros(1, device=self.S.device))

    def weight(self) -> Tensor:
        """``W' = U (S + M) V^T`` (m, n) in the dtype of the model."""
        diagonal = (self.S + torch.sigmoid(self.gate) * self.values).to(self.U.dtype)
        return self.U @ (diagonal[:, None] * self.Vh)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight().T
        return y if self.bias is None else y + self.bias


class TrainableBias(nn.Module):
    """The floor: a frozen linear layer with a trainable bias, the least for which backward runs through a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = base.weight
        rows = base.weight.shape[0]
        start = base.weight.new_zeros(rows) if base.bias is None else base.bias.detach().clone()
        self.bias = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)
