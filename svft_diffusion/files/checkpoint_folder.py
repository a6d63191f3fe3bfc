"""Finding tensors in the safetensors files of a model's folder, as diffusers and transformers lay them out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn

# T5 saves the table of its tokens under the name that it shares it by.
_SHARED_NAMES = {"encoder.embed_tokens.weight": "shared.weight"}


def checkpoint_folders(model: nn.Module) -> Iterator[Path]:
    """Local folders that a model may have been loaded from: the one it names, then the components in it.

    The model itself says where: a folder, or a repository in the local hub cache; nothing is fetched. One that was
    loaded with ``subfolder=`` names the folder above.
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


def stored_name(name: str, files: Mapping[str, Path]) -> str | None:
    """What a checkpoint calls the tensor ``name``: it may have a prefix more or less, such as ``text_model.``."""
    if name in files:
        return name
    similar = [key for key in files if key.endswith(f".{name}") or name.endswith(f".{key}")]
    if not similar and _SHARED_NAMES.get(name) in files:
        return _SHARED_NAMES[name]
    return similar[0] if len(similar) == 1 else None


def weight_files(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it.

    A folder may hold a model more than once, as `model.safetensors` and as its variant `model.fp16.safetensors`,
    each in one file or in shards with an index: ``variant`` comes first, then what is none.

    Raises:
        OSError: no folder, or none with safetensors weights.
        ValueError: an index is no index.
        safetensors.SafetensorError: a damaged file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    whole = [file for file in folder.glob("*.safetensors") if "-of-" not in file.name]
    indexes = list(folder.glob("*.safetensors.index*.json"))
    # Among files of one kind `model` comes before, say, `adapter_model`.
    candidates = sorted(
        [*whole, *indexes],
        key=lambda file: (
            _variant(file) != variant, _variant(file) is not None, file in indexes, len(file.name), file.name
        ),
    )  # fmt: skip
    if not candidates:
        raise FileNotFoundError(f"no safetensors weights in {folder}")
    chosen = candidates[0]
    if chosen in indexes:
        return _files_of_index(chosen)
    with safe_open(chosen, framework="pt") as file:
        return dict.fromkeys(file.keys(), chosen)


def _variant(file: Path) -> str | None:
    # `model.fp16.safetensors`, `model.safetensors.index.fp16.json`
    return ".".join(part for part in file.name.split(".")[1:] if part not in ("safetensors", "index", "json")) or None


def _files_of_index(index: Path) -> dict[str, Path]:
    content: Any = json.loads(index.read_text(encoding="utf-8"))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} holds no weight_map")
    return {str(tensor): index.parent / str(file) for tensor, file in weight_map.items()}
