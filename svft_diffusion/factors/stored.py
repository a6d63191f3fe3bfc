"""Weights as the checkpoint holds them, where a model was cast to fewer bits when it was loaded.

The small singular values and their vectors depend on the last bits of a weight, so factors are computed from the
checkpoint's own values where these can be reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from svft_diffusion.files.checkpoint_folder import weight_files

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
    for folder in _checkpoint_folders(model):
        try:
            stored = _finer_tensor(folder, f"{path}.weight", live)
        except (OSError, ValueError, SafetensorError):
            continue  # no weights there, or damaged ones
        if stored is not None and _casts_to(stored, live):
            return stored
    return None


def _checkpoint_folders(model: nn.Module) -> Iterator[Path]:
    """Local folders that the model may have been loaded from: the one it names, then the components in it.

    A model that was loaded with ``subfolder=`` names the folder above.
    """
    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    if not source:
        return
    folder = Path(source)
    if not folder.is_dir():
        try:
            revision = getattr(config, "_commit_hash", None)
            folder = Path(snapshot_download(str(source), revision=revision, local_files_only=True))
        except (OSError, ValueError):
            return  # not in the local hub cache, or no name of a repository at all
    yield folder
    yield from sorted(inner for inner in folder.iterdir() if inner.is_dir())


def _finer_tensor(folder: Path, name: str, live: Tensor) -> Tensor | None:
    files = weight_files(folder)
    key = _stored_name(name, files)
    if key is None:
        return None
    with safe_open(files[key], framework="pt") as file:
        if tuple(file.get_slice(key).get_shape()) != tuple(live.shape):
            return None
        stored: Tensor = file.get_tensor(key)
    if not stored.is_floating_point() or torch.finfo(stored.dtype).eps >= torch.finfo(live.dtype).eps:
        return None
    return stored


def _stored_name(name: str, files: Mapping[str, Path]) -> str | None:
    """What the checkpoint calls the tensor ``name``: it may have a prefix more or less, such as ``text_model.``."""
    if name in files:
        return name
    similar = [key for key in files if key.endswith(f".{name}") or name.endswith(f".{key}")]
    return similar[0] if len(similar) == 1 else None


def _casts_to(stored: Tensor, live: Tensor) -> bool:
    """Whether ``stored``, cast to the dtype of ``live``, is ``live`` bit for bit: signs of zeros count."""
    blocks = zip(stored.reshape(-1).split(_BLOCK), live.detach().cpu().reshape(-1).split(_BLOCK), strict=True)
    return all(torch.equal(a.to(live.dtype).view(torch.int16), b.view(torch.int16)) for a, b in blocks)
