"""Is the model at hand the one that an adapter was trained on? Its adapted weights are compared by their digests.

Of a model that was cast down when it was loaded, the checkpoint's own values count where they can be reached: rounded
to bfloat16 here and to float16 there, the same weights would share nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from svft_diffusion.errors import UserError
from svft_diffusion.files.checkpoint_folder import stored_name, weight_files
from svft_diffusion.files.names import base_module, components_of, module_path, split_canonical_name
from svft_diffusion.files.quantized import is_quantized, kept_full_weight, read_full_weight
from svft_diffusion.files.stored_weight import stored_weight
from svft_diffusion.files.weight_digests import (
    BaseDigests,
    Matches,
    WeightDigest,
    agreement,
    agreement_of_digests,
    digest_of_weight,
    digests_of_base,
)

if TYPE_CHECKING:
    from svft_diffusion.files.header import AdapterHeader

# Hashing and casting leave the interpreter to others; more threads hold more copies of weights.
_LARGEST_NUMBER_OF_THREADS = 4

Result = TypeVar("Result")


def digests_of_pipeline(pipe: object, names: Iterable[str]) -> BaseDigests:
    """Digests of a loaded model's weights, below any adapter layers; all of each weight is read.

    Args:
        pipe: a pipeline, or a mapping of component names to models.
        names: canonical names of the adapted layers.

    Raises:
        UserError: the pipeline lacks one of the layers, or the full weight of a quantized one is not to be had.
    """
    layers = _layers_of(pipe, names)

    def digest(position: int) -> WeightDigest:
        model, path, layer = layers[position]
        if is_quantized(layer):
            kept = kept_full_weight(layer)
            return digest_of_weight(read_full_weight(model, path, layer)) if kept is None else kept.digest
        live = _weight_of(layer)
        finer = stored_weight(model, path, live)
        return digest_of_weight(live if finer is None else finer)

    return digests_of_base(_in_threads(digest, len(layers)))


def matches_of_pipeline(pipe: object, names: Iterable[str], trained: BaseDigests) -> Matches:
    """How many weights of a loaded model are those of the training.

    Raises:
        UserError: the pipeline lacks one of the layers, or the full weight of a quantized one is not to be had.
    """
    layers = _layers_of(pipe, names)

    def agree(position: int) -> str | None:
        model, path, layer = layers[position]
        if is_quantized(layer):
            kept = kept_full_weight(layer)
            if kept is not None:
                return agreement_of_digests(kept.digest, trained, position)
            return agreement(read_full_weight(model, path, layer), trained, position)
        live = _weight_of(layer)
        found = agreement(live, trained, position)
        if found != "exact" and (finer := stored_weight(model, path, live)) is not None:
            return agreement(finer, trained, position) or found
        return found

    return _counted(_in_threads(agree, len(layers)))


def number_taken_on_trust(pipe: object, names: Iterable[str]) -> int:
    """Of how many of these layers the weights in the checkpoint stand for quantized ones, which can't prove it."""
    return sum(is_quantized(layer) and kept_full_weight(layer) is None for _, _, layer in _layers_of(pipe, names))


def matches_of_folder(
    folder: str | Path, names: Sequence[str], trained: BaseDigests, variant: str | None = None
) -> Matches | None:
    """The same for a diffusers folder on disk, or a ``variant`` in it, of which no model is made.

    Returns None where ``folder`` is no local diffusers folder with safetensors weights. A layer that it lacks is a
    weight that does not match.
    """
    folder = Path(folder)
    try:
        files = {
            component: weight_files(folder / component, variant)
            for component in {split_canonical_name(name)[0] for name in names}
        }
    except (OSError, ValueError, SafetensorError):
        return None
    ordered = sorted(names)

    def agree(position: int) -> str | None:
        component, path = split_canonical_name(ordered[position])
        weight = _weight_of_file(files[component], path)
        return None if weight is None else agreement(weight, trained, position)

    return _counted(_in_threads(agree, len(ordered)))


def fingerprint_of_pipeline(pipe: object, names: Iterable[str]) -> str:
    """One short text for the weights of these layers, see `BaseDigests.fingerprint`."""
    return digests_of_pipeline(pipe, names).fingerprint


def check_base(header: AdapterHeader, matches: Matches, base_name: str, *, adapter: str = "the adapter") -> None:
    """Refuse a base of which not every adapted weight is that of the training.

    Raises:
        UserError: the message names both bases, how much of them agrees, and the way out.
    """
    if not matches.all:
        raise UserError(
            f"{both_bases(header, matches, base_name, adapter=adapter)}; give it the base {header.base.name}, or "
            '--on_mismatch align (on_mismatch="align") if this is a slightly other copy of that'
        )


def both_bases(header: AdapterHeader, matches: Matches, base_name: str, *, adapter: str) -> str:
    """One line on the base of the training, the one at hand, and how much of them agrees."""
    return (
        f"{adapter} was trained on the base {header.base.name} (fingerprint {header.base.short_fingerprint}), but the "
        f"loaded base is {base_name}: {matches}"
    )


def _layers_of(pipe: object, names: Iterable[str]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Model, canonical path and the frozen layer itself of each layer, in the order of the names."""
    components = components_of(pipe)
    layers = []
    for name in sorted(names):
        component, path = split_canonical_name(name)
        try:
            model = components[component]
            layer = base_module(model.get_submodule(module_path(model, path)))
        except (KeyError, AttributeError):
            raise UserError(f"the pipeline has no layer {name}") from None
        layers.append((model, path, layer))
    return layers


def _weight_of(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _weight_of_file(files: Mapping[str, Path], path: str) -> Tensor | None:
    name = stored_name(f"{path}.weight", files)
    if name is None:
        return None
    try:
        with safe_open(files[name], framework="pt") as file:
            weight: Tensor = file.get_tensor(name)
    except (OSError, SafetensorError):
        return None
    return weight


def _counted(found: Sequence[str | None]) -> Matches:
    return Matches(sum(kind is not None for kind in found), found.count("rounded"), len(found))


def _in_threads(function: Callable[[int], Result], number: int) -> list[Result]:
    with ThreadPoolExecutor(min(_LARGEST_NUMBER_OF_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, range(number)))
