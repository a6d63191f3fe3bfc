"""The kinds of modules that an adapter can go around, and what each does with the two halves of ``U M V^T``.

Every weight is seen as a matrix ``W`` (m, n) that acts on column vectors, so that one formula serves all kinds:
a convolution's kernel is (c_out, c_in * kernel size), and the tables of `nn.Embedding` and transformers' `Conv1D`,
which are stored the other way round, are transposed. A norm's weight is a vector and has no singular values.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

Kind = Literal["linear", "convolution", "embedding", "conv1d", "norm"]


def layer_kind(module: nn.Module) -> Kind | None:
    """What kind of layer a module is, or None if no adapter can go around it."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolution"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, Conv1D):
        return "conv1d"
    weight = getattr(module, "weight", None)
    if "norm" in type(module).__name__.lower() and isinstance(weight, nn.Parameter) and weight.ndim == 1:
        return "norm"  # LayerNorm, GroupNorm and the RMSNorms that every library has of its own
    return None


def has_plain_forward(module: nn.Module) -> bool:
    """Whether a layer computes exactly what its kind does; a subclass that computes more is called as it is."""
    forward = type(module).forward
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, Conv1D)
    return any(forward is kind.forward for kind in plain) and getattr(module, "groups", 1) == 1


def matrix_of(kind: Kind, weight: Tensor) -> Tensor:
    """The weight of a layer as ``W`` (m, n)."""
    if kind in ("embedding", "conv1d"):
        return weight.T
    return weight.reshape(weight.shape[0], -1)


def weight_of(kind: Kind, matrix: Tensor, like: Tensor) -> Tensor:
    """A matrix (m, n) in the shape of the weight ``like``: the way back from `matrix_of`."""
    if kind in ("embedding", "conv1d"):
        return matrix.T
    return matrix.reshape(like.shape)


def feature_dimension(module: nn.Module) -> int:
    """Dimension of a layer's output that counts its features: the last, or the one before the picture's."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return 1 - module.weight.ndim
    return 1 if isinstance(module, nn.GroupNorm | nn.modules.batchnorm._NormBase) else -1


def along_features(module: nn.Module, vector: Tensor, dimensions: int) -> Tensor:
    """A vector (features,), or one for each sample (B, features), shaped to meet an output of so many dimensions."""
    shape = [1] * dimensions
    shape[feature_dimension(module)] = vector.shape[-1]
    if vector.ndim == 2:
        shape[0] = len(vector)
    return vector.reshape(shape)


def project(kind: Kind, module: nn.Module, x: Tensor, Vh: Tensor) -> Tensor:
    """``V^T x`` for the input ``x`` of ``module`` and ``Vh`` (r, n): features last, (..., r)."""
    if kind == "embedding":
        return functional.embedding(x, Vh.T)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kernel = Vh.reshape(len(Vh), *module.weight.shape[1:])
        z: Tensor = module._conv_forward(x, kernel, None)
        return z.movedim(feature_dimension(module), -1)
    return functional.linear(x, Vh)


def expand(kind: Kind, module: nn.Module, z: Tensor, U: Tensor) -> Tensor:
    """``U z`` for ``z`` (..., r) with features last and ``U`` (m, r), in the layout of the layer's output."""
    y = functional.linear(z, U)
    return y.movedim(-1, feature_dimension(module)) if kind == "convolution" else y
