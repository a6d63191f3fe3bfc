"""Baking the adapters of a pipeline into its weights, for good: what is left is a plain pipeline."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from svft_diffusion.adapters.injection import adapters_of, remove
from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.errors import UserError
from svft_diffusion.files.checkpoint_folder import checkpoint_folders, weight_files
from svft_diffusion.files.names import components_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# A parameter that a model holds several times -> where: modules and attributes.
Holders = Mapping[nn.Parameter, list[tuple[nn.Module, str]]]


def merge_adapters(pipe: DiffusionPipeline, dtypes: Mapping[str, torch.dtype]) -> dict[str, int]:
    """Put the active adapters, at their weights, into the weights of a pipeline, and take all adapters out of it.

    The sum of a weight and its updates runs in float32, so a pipeline that was loaded in float32 is rounded once: to
    the dtype at the end. One layer after the other is merged and let go of, with its old weight and its factors, so
    that there is never more than one layer's weight twice. Learned tokens are not merged, but taken out.

    Args:
        pipe: with adapters; the weights are those of `svft_diffusion.adapters.set_adapters`.
        dtypes: component -> dtype of its weights in the end; components left out keep theirs.

    Returns:
        Component -> number of layers that changed.

    Raises:
        UserError: a merged weight is too large for its dtype, or not finite. The pipeline is of no use any more then.
    """
    merged = {}
    components = components_of(pipe)
    names = {name for model in components.values() for name in adapters_of(model)}
    for component, model in components.items():
        dtype = dtypes.get(component)
        holders = _holders_of_shared_parameters(model)
        paths = [path for path, module in model.named_modules() if isinstance(module, SpectralLayer)]
        merged[component] = sum(_merge_layer(component, model, path, holders, dtype) for path in paths)
        for name in names:  # what PEFT noted of them in the model, and their learned tokens
            remove(model, name)
    for component, part in pipe.components.items():
        if isinstance(part, nn.Module) and component in dtypes:
            nn.Module.to(part, dtypes[component])  # diffusers' own warns of modules that some models keep in float32
    return {component: layers for component, layers in merged.items() if layers}


def stored_dtypes(
    pipe: DiffusionPipeline, variant: str | None = None, single_file: Path | None = None
) -> dict[str, torch.dtype]:
    """Component -> dtype of the weights in the files that it was loaded from; that of the model where none are found.

    It is float32 where a component's file holds several.

    Args:
        single_file: what the whole pipeline was loaded from; its tensors outside of the components don't count.
    """
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    if single_file is not None:
        return dict.fromkeys(models, _most_frequent_dtype(single_file))
    return {name: _stored_dtype(model, variant) or _own_dtype(model) for name, model in models.items()}


def _stored_dtype(model: nn.Module, variant: str | None) -> torch.dtype | None:
    for folder in checkpoint_folders(model):
        try:
            found = set()
            for file in set(weight_files(folder, variant).values()):
                with safe_open(file, framework="pt") as opened:
                    found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError):  # no weights there
            continue
        floating = found & _STORED.keys()
        return _STORED[floating.pop()] if len(floating) == 1 else torch.float32
    return None


def _most_frequent_dtype(file: Path) -> torch.dtype:
    with safe_open(file, framework="pt") as opened:
        found = Counter(opened.get_slice(name).get_dtype() for name in opened.keys())  # noqa: SIM118
    return _STORED[max(_STORED, key=lambda dtype: found[dtype])]


def _own_dtype(model: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in model.parameters()), torch.float32)


def _merge_layer(component: str, model: nn.Module, path: str, holders: Holders, dtype: torch.dtype | None) -> bool:
    """Whether the layer has changed."""
    layer = model.get_submodule(path)
    assert isinstance(layer, SpectralLayer)
    base = layer.get_base_layer()
    before = dict(base.named_parameters(recurse=False))
    layer.merge()
    changed = {name: new for name, new in base.named_parameters(recurse=False) if new is not before[name]}
    for name, parameter in changed.items():
        if not torch.isfinite(parameter.to(dtype or parameter.dtype)).all():
            raise UserError(
                f"the merged {name} of {component}.{path} does not fit into {str(dtype).removeprefix('torch.')}; "
                "use lower weights, or --dtype bfloat16 or float32"
            )
        # T5 holds its table of tokens a second time, under the name that files have it by.
        for module, attribute in holders.get(before[name], ()):
            setattr(module, attribute, parameter)
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.base_layer)
    return bool(changed)


def _holders_of_shared_parameters(model: nn.Module) -> Holders:
    holders = defaultdict(list)
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            holders[parameter].append((module, attribute))
    return {parameter: places for parameter, places in holders.items() if len(places) > 1}
