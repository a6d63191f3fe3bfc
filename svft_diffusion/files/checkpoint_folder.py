"""Finding tensors in the safetensors files of a model's folder, as diffusers and transformers lay them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it.

    A folder may hold a model more than once, as `model.safetensors` and as its variant `model.fp16.safetensors`,
    each in one file or in shards with an index: what is no variant comes first.

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
        [*whole, *indexes], key=lambda file: (_is_variant(file), file in indexes, len(file.name), file.name)
    )
    if not candidates:
        raise FileNotFoundError(f"no safetensors weights in {folder}")
    chosen = candidates[0]
    if chosen in indexes:
        return _files_of_index(chosen)
    with safe_open(chosen, framework="pt") as file:
        return dict.fromkeys(file.keys(), chosen)


def _is_variant(file: Path) -> bool:
    # `model.fp16.safetensors`, `model.safetensors.index.fp16.json`
    return bool(set(file.name.split(".")[1:]) - {"safetensors", "index", "json"})


def _files_of_index(index: Path) -> dict[str, Path]:
    content: Any = json.loads(index.read_text(encoding="utf-8"))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} holds no weight_map")
    return {str(tensor): index.parent / str(file) for tensor, file in weight_map.items()}
