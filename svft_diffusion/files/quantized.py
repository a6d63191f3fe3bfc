"""Layers whose weight a library has quantized, and what is known of the full weight that they were made from.

An adapter's values stand on the singular vectors of the full weight, and its file holds that one's digests: an adapter
is the same on the full base and on a quantized one. The few bits that a layer is left with tell neither.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from svft_diffusion.errors import UserError
from svft_diffusion.files.checkpoint_folder import checkpoint_folders, stored_name, weight_files
from svft_diffusion.files.weight_digests import WeightDigest
from svft_diffusion.spectral import SingularFactors


class FullWeight(NamedTuple):
    """What is kept of a weight that was quantized while somebody looked."""

    digest: WeightDigest
    factors: SingularFactors  # of the weight as a matrix


# Not in the layers, whose classes belong to others.
_known: weakref.WeakKeyDictionary[nn.Module, FullWeight] = weakref.WeakKeyDictionary()


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is held in few bits, as bitsandbytes, torchao, quanto or GGUF files hold it."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    if not weight.is_floating_point() or weight.element_size() == 1:
        return True
    # A tensor class of its own that passes for a float; those of torch.distributed are spread, and hold full values.
    return type(weight.data) is not Tensor and not hasattr(weight, "device_mesh")


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a layer's full weight; packed ones are of another."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape)


def keep_full_weight(module: nn.Module, full: FullWeight) -> None:
    """Remember for a quantized layer what its weight was."""
    _known[module] = full


def kept_full_weight(module: nn.Module) -> FullWeight | None:
    """What `keep_full_weight` was told, or None."""
    return _known.get(module)


def read_full_weight(model: nn.Module, path: str, module: nn.Module) -> Tensor:
    """The full weight of the quantized layer at ``path`` in ``model``, from the checkpoint that the model names.

    It is taken for the one that was quantized: the layer's bits can't prove it.

    Raises:
        UserError: the checkpoint can't be reached, or is itself quantized.
    """
    shape = weight_shape(module)
    for folder in checkpoint_folders(model):
        try:
            files = weight_files(folder)
            name = stored_name(f"{path}.weight", files)
            if name is None:
                continue
            with safe_open(files[name], framework="pt") as file:
                if tuple(file.get_slice(name).get_shape()) != shape:
                    continue
                stored: Tensor = file.get_tensor(name)
        except (OSError, ValueError, SafetensorError):
            continue  # no weights there, or damaged ones
        if stored.is_floating_point() and stored.element_size() > 1:
            return stored
    raise UserError(
        f"layer {path} is quantized ({module.weight.dtype}), and adapters stand on the singular vectors of its full "
        "weight, which is not to be had: load the base model unquantized, or quantize it while it is loaded from a "
        "folder or the Hub's cache with the full weights in safetensors format"
    )
