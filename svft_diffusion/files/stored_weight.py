"""Weights as the checkpoint holds them, where a model was cast to fewer bits when it was loaded.

The small singular values and their vectors depend on the last bits of a weight, so factors are computed from the
checkpoint's own values where these can be reached.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from svft_diffusion.files.checkpoint_folder import checkpoint_folders, stored_name, weight_files

# Elements compared at a time: they stay in the processor's cache, and are too few for PyTorch to start threads.
_BLOCK = 2**15


def stored_weight(model: nn.Module, path: str, live: Tensor) -> Tensor | None:
    """The weight of the module at ``path`` in ``model``, as the checkpoint holds it in more bits than ``live``.

    The model itself says where it was loaded from: a folder, or a repository in the local hub cache. Nothing is
    fetched, and only this tensor is read.

    Args:
        live: the weight in the model, in the shape in which it is stored.

    Returns:
        The stored tensor, on the CPU, if it equals ``live`` bit for bit when cast to its dtype. Else None: ``live``
        is in float32 already, or its checkpoint can't be reached, is no finer, or holds other values.
    """
    if live.dtype not in (torch.float16, torch.bfloat16) or live.is_meta:
        return None
    for folder in checkpoint_folders(model):
        try:
            stored = _finer_tensor(folder, f"{path}.weight", live)
        except (OSError, ValueError, SafetensorError):
            continue  # no weights there, or damaged ones
        if stored is not None and _casts_to(stored, live):
            return stored
    return None


def _finer_tensor(folder: Path, name: str, live: Tensor) -> Tensor | None:
    files = weight_files(folder)
    key = stored_name(name, files)
    if key is None:
        return None
    with safe_open(files[key], framework="pt") as file:
        if tuple(file.get_slice(key).get_shape()) != tuple(live.shape):
            return None
        stored: Tensor = file.get_tensor(key)
    if not stored.is_floating_point() or torch.finfo(stored.dtype).eps >= torch.finfo(live.dtype).eps:
        return None
    return stored


def _casts_to(stored: Tensor, live: Tensor) -> bool:
    """Whether ``stored``, cast to the dtype of ``live``, is ``live`` bit for bit: signs of zeros count."""
    blocks = zip(stored.reshape(-1).split(_BLOCK), live.detach().cpu().reshape(-1).split(_BLOCK), strict=True)
    return all(torch.equal(a.to(live.dtype).view(torch.int16), b.view(torch.int16)) for a, b in blocks)
