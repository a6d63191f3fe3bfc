"""Fingerprint of the base weights that an adapter changes: was it trained on the model at hand?

Up to 64 evenly spaced elements of every adapted weight are hashed, cast to float16; and cast to bfloat16, because
a pipeline loaded in bfloat16 no longer knows its float16 values. A fingerprint reads
``float16:<hash> bfloat16:<hash>``, and two fingerprints agree when they share a part. Of a model that was cast down
when it was loaded, the checkpoint's own values count where they can be reached: rounded to bfloat16 here and to
float16 there, the same weights would share nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from svft_diffusion.errors import UserError
from svft_diffusion.files.checkpoint_folder import checkpoint_folders, stored_name, weight_files
from svft_diffusion.files.names import base_module, components_of, module_path, split_canonical_name

if TYPE_CHECKING:
    from svft_diffusion.files.header import AdapterHeader

_SAMPLES = 64
_HASH_LENGTH = 32

Sample = tuple[tuple[int, ...], Tensor]  # shape of the weight, its sampled elements


def fingerprint_of_pipeline(pipe: object, names: Iterable[str]) -> str:
    """Fingerprint of a loaded model's weights, below any adapter layers.

    Args:
        pipe: a pipeline, or a mapping of component names to models.
        names: canonical names of the adapted layers.

    Raises:
        UserError: the pipeline lacks one of the layers.
    """
    components = components_of(pipe)
    checkpoints: dict[str, list[dict[str, Path]]] = {}
    samples = {}
    for name in names:
        component, path = split_canonical_name(name)
        try:
            layer = components[component].get_submodule(module_path(components[component], path))
        except (KeyError, AttributeError):
            raise UserError(f"the pipeline has no layer {name}") from None
        live = _sample_of_layer(base_module(layer))
        if live[1].dtype in (torch.float16, torch.bfloat16):
            if component not in checkpoints:
                checkpoints[component] = _checkpoints_of(components[component])
            live = _finer_sample(checkpoints[component], path, live) or live
        samples[name] = live
    return _fingerprint(samples)


def fingerprint_of_folder(folder: str | Path, names: Iterable[str], variant: str | None = None) -> str | None:
    """The same fingerprint from a diffusers folder on disk, or a ``variant`` in it, reading only the sampled rows.

    Returns None where ``folder`` is no local diffusers folder with safetensors weights, or lacks one of the layers.
    """
    folder = Path(folder)
    by_component: dict[str, list[str]] = {}
    for name in names:
        by_component.setdefault(split_canonical_name(name)[0], []).append(name)
    samples = {}
    try:
        for component, component_names in by_component.items():
            files = weight_files(folder / component, variant)
            for name in component_names:
                sample = _sample_of_file(files, split_canonical_name(name)[1])
                if sample is None:
                    return None
                samples[name] = sample
    except (OSError, ValueError, SafetensorError):
        return None
    return _fingerprint(samples)


def check_base(header: AdapterHeader, fingerprint: str, base_name: str, *, adapter: str = "the adapter") -> None:
    """Compare the base that the adapter was trained on with the one at hand.

    Raises:
        UserError: they differ; the message names both and the way out.
    """
    trained_on = set(header.base.fingerprint.split())
    if trained_on & set(fingerprint.split()):
        return
    raise UserError(
        f"{adapter} was trained on the base {header.base.name} ({_short(header.base.fingerprint)}), "
        f"but the loaded base is {base_name} ({_short(fingerprint)}): their weights differ, "
        f"use --pretrained_model_name_or_path {header.base.name}"
    )


def _short(fingerprint: str) -> str:
    parts = fingerprint.split()
    return f"fingerprint {parts[0].partition(':')[2][:8]}" if parts else "no fingerprint"


def _fingerprint(samples: Mapping[str, Sample]) -> str:
    # A bfloat16 weight has lost the bits that the float16 part is made of.
    lossy = any(values.dtype == torch.bfloat16 for _, values in samples.values())
    dtypes = {"bfloat16": torch.bfloat16} if lossy else {"float16": torch.float16, "bfloat16": torch.bfloat16}
    parts = []
    for label, dtype in dtypes.items():
        digest = hashlib.sha256()
        for name in sorted(samples):
            shape, values = samples[name]
            digest.update(f"{name}|{shape}|".encode())
            digest.update(values.to(dtype).view(torch.uint8).numpy().tobytes())
        parts.append(f"{label}:{digest.hexdigest()[:_HASH_LENGTH]}")
    return " ".join(parts)


def _sampled_positions(numel: int) -> list[int]:
    count = min(_SAMPLES, numel)
    return [index * (numel - 1) // max(count - 1, 1) for index in range(count)]


def _sample_of_layer(layer: nn.Module) -> Sample:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    positions = torch.tensor(_sampled_positions(weight.numel()), device=weight.device)
    return tuple(weight.shape), weight.detach().reshape(-1)[positions].cpu()


def _checkpoints_of(model: nn.Module) -> list[dict[str, Path]]:
    found = []
    for folder in checkpoint_folders(model):
        with contextlib.suppress(OSError, ValueError, SafetensorError):  # no weights there, or damaged ones
            found.append(weight_files(folder))
    return found


def _finer_sample(checkpoints: Iterable[Mapping[str, Path]], canonical_path: str, live: Sample) -> Sample | None:
    """The sample that a checkpoint holds in more bits, if cast to the dtype of ``live`` it is the same."""
    shape, values = live
    for files in checkpoints:
        with contextlib.suppress(OSError, SafetensorError):
            stored = _sample_of_file(files, canonical_path)
            if stored is not None and stored[0] == shape and torch.equal(stored[1].to(values.dtype), values):
                return stored
    return None


def _sample_of_file(files: Mapping[str, Path], canonical_path: str) -> Sample | None:
    tensor = stored_name(f"{canonical_path}.weight", files)
    if tensor is None:
        return None
    with safe_open(files[tensor], framework="pt") as file:
        rows = file.get_slice(tensor)
        shape = tuple(rows.get_shape())
        width = 1
        for size in shape[1:]:
            width *= size
        values = [
            rows[position // width : position // width + 1].reshape(-1)[position % width]
            for position in _sampled_positions(shape[0] * width)
        ]
    return shape, torch.stack(values)
