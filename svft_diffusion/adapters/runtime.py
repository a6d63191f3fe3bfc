"""Adapters on a pipeline: load, blend, unload, save. The command line, the app and users' code call these."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.config import SpectralConfig
from svft_diffusion.adapters.injection import adapters_of, inject, refuse_fused, remove, spectral_layers
from svft_diffusion.adapters.methods import method_named
from svft_diffusion.adapters.names import usable_adapter_name
from svft_diffusion.adapters.targets import PRESETS, matching_layers
from svft_diffusion.adapters.training import adapter_state
from svft_diffusion.adapters.tuner import layer_options
from svft_diffusion.errors import UserError
from svft_diffusion.files.adapter_file import (
    VALUES_SUFFIX,
    AdapterHeader,
    AdapterMetadata,
    BaseModel,
    library_versions,
    read_adapter,
    write_adapter,
)
from svft_diffusion.files.fingerprint import check_base, fingerprint_of_pipeline
from svft_diffusion.files.names import components_of, module_path, split_canonical_name

_logger = logging.getLogger(__name__)

# One weight for the whole adapter, or one for each component.
AdapterWeight = float | Mapping[str, float]


def load_adapter(
    pipe: object,
    file: str | os.PathLike[str],
    name: str | None = None,
    *,
    on_mismatch: Literal["error", "warn"] = "error",
) -> str:
    """Load an adapter file into a pipeline; it is active at weight 1 beside those already active.

    Args:
        pipe: a diffusers pipeline, or a mapping of component names to models.
        file: the adapter's ``.safetensors`` file.
        name: what to call it; the file's name, made fit for a parameter, when left out.
        on_mismatch: what to do when the adapter was trained on other base weights: refuse, or log and go on.

    Returns:
        The name of the adapter.

    Raises:
        UserError: the file, the pipeline or the name does not fit; the pipeline is as it was.
    """
    file = Path(file)
    header, tensors = read_adapter(file)
    components = components_of(pipe)
    name = usable_adapter_name(file.stem) if name is None else name
    _check_free(components, name)
    by_component = _tensors_by_component(file, components, tensors)
    config = SpectralConfig(
        method=header.method,
        pattern=header.pattern,
        off_diagonals=header.off_diagonals,
        rank=header.rank,
        targets=header.targets,
        target_modules=sorted({path for paths in by_component.values() for path in paths}),
        inference_mode=True,
    )
    for component, values in by_component.items():
        refuse_fused(components[component], f"load {file.name}")
        _check_fit(file, component, components[component], config, values)
    _check_base_weights(pipe, file, header, tensors, on_mismatch)
    try:
        for component, values in by_component.items():
            _inject_values(components[component], config, name, values)
    except BaseException:
        for component in by_component:
            remove(components[component], name)
        raise
    return name


def unload_adapter(pipe: object, name: str) -> None:
    """Remove an adapter. When no other is left, the original layers are back: base names, base output, bit for bit.

    Raises:
        UserError: no such adapter, or it is fused.
    """
    components = components_of(pipe)
    _check_loaded(components, [name])
    for model in components.values():
        refuse_fused(model, f"unload {name!r}")
    for model in components.values():
        if name in adapters_of(model):
            remove(model, name)


def set_adapters(pipe: object, weights: Mapping[str, AdapterWeight]) -> None:
    """Choose the adapters that act and their weights; what is not mentioned is off.

    ``{"dog": 0.8, "style": {"unet": 0.5, "text_encoder": 0.0}}``. Weight 0 is off, bit for bit; with a mapping for
    one adapter, components that it leaves out are off.

    Raises:
        UserError: unknown adapter or component, a weight that is no finite number, or an adapter is fused.
    """
    components = components_of(pipe)
    _check_loaded(components, list(weights))
    for name, weight in weights.items():
        _check_weight(components, name, weight)
    for model in components.values():
        refuse_fused(model, "change weights")
    for component, model in components.items():
        for layer in spectral_layers(model).values():
            layer.unscale_layer()
            layer.set_adapter(list(weights), inference_mode=True)
            for name, weight in weights.items():
                layer.set_scale(name, weight.get(component, 0.0) if isinstance(weight, Mapping) else weight)


def save_adapter(pipe: object, name: str, file: str | os.PathLike[str], *, metadata: AdapterMetadata) -> Path:
    """Write an adapter of a pipeline (or of a mapping of component names to models) to a file.

    Equal values and metadata give equal bytes.

    Raises:
        UserError: no such adapter, it is fused, its values are not finite, or the file can't be written.
    """
    components = components_of(pipe)
    state = adapter_state(pipe, name)
    for model in components.values():
        refuse_fused(model, f"save {name!r}")
    used = {component: model for component, model in components.items() if name in adapters_of(model)}
    config: SpectralConfig = next(iter(used.values())).peft_config[name]  # type: ignore[index,assignment]
    layers = [key.removesuffix(VALUES_SUFFIX) for key in state]
    header = AdapterHeader(
        method=config.method,
        pattern=config.pattern,
        off_diagonals=config.off_diagonals,
        rank=config.rank,
        targets=_targets_label(used, name, config.targets),
        components={component: len(spectral_layers(model, name)) for component, model in used.items()},
        base=BaseModel(
            name=metadata.base_name,
            family=metadata.base_family,
            fingerprint=metadata.base_fingerprint or fingerprint_of_pipeline(pipe, layers),
        ),
        trigger=metadata.trigger,
        instance_prompt=metadata.instance_prompt,
        class_prompt=metadata.class_prompt,
        suggested_strength=metadata.suggested_strength,
        training=metadata.training,
        libraries=library_versions(),
    )
    return write_adapter(Path(file), header, state)


def loaded_adapters(pipe: object) -> list[str]:
    """Names of the adapters in a pipeline, sorted."""
    return sorted({name for model in components_of(pipe).values() for name in adapters_of(model)})


def _check_free(components: Mapping[str, nn.Module], name: str) -> None:
    for model in components.values():
        if name in adapters_of(model) or name in getattr(model, "peft_config", {}):
            raise UserError(f"an adapter {name!r} is already loaded; give this one another name or unload that first")


def _tensors_by_component(
    file: Path, components: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Component -> path of the layer in this version of the model -> values."""
    sorted_out: dict[str, dict[str, Tensor]] = {}
    for key, values in tensors.items():
        component, path = split_canonical_name(key.removesuffix(VALUES_SUFFIX))
        if component not in components:
            raise UserError(f"{file} adapts the {component}, which this pipeline does not have")
        sorted_out.setdefault(component, {})[module_path(components[component], path)] = values
    return sorted_out


def _check_fit(
    file: Path, component: str, model: nn.Module, config: SpectralConfig, values: Mapping[str, Tensor]
) -> None:
    """Refuse a file whose layers or shapes are not the model's, before any layer is touched."""
    for path, tensor in values.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise UserError(
                f"{file} was made for another architecture: there is no layer {path} in this {component}"
            ) from None
        expected = method_named(config.method).number_of_values(layer_options(module, path, config))
        if len(tensor) != expected:
            raise UserError(
                f"{file} was made for another architecture: layer {path} of the {component} takes {expected} values, "
                f"the file has {len(tensor)}"
            )


def _check_base_weights(
    pipe: object, file: Path, header: AdapterHeader, tensors: Mapping[str, Tensor], on_mismatch: str
) -> None:
    if on_mismatch not in ("error", "warn"):
        raise UserError(f"unknown on_mismatch {on_mismatch!r}; choose from error, warn")
    fingerprint = fingerprint_of_pipeline(pipe, [key.removesuffix(VALUES_SUFFIX) for key in tensors])
    try:
        check_base(header, fingerprint, _base_name(pipe), adapter=file.name)
    except UserError as problem:
        if on_mismatch == "error":
            raise
        _logger.warning("%s", problem)


def _base_name(pipe: object) -> str:
    name = str(getattr(pipe, "name_or_path", "") or "a model without a name")
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _inject_values(model: nn.Module, config: SpectralConfig, name: str, values: Mapping[str, Tensor]) -> None:
    layers_before = spectral_layers(model).values()
    active = sorted({other for layer in layers_before for other in layer.active_adapters})
    inject(model, config, name, list(values))
    for path, layer in spectral_layers(model).items():
        if path in values:
            with torch.no_grad():
                layer.spectral_values[name].copy_(values[path])
        layer.enable_adapters(True)
        layer.set_adapter([*active, name], inference_mode=True)


def _check_loaded(components: Mapping[str, nn.Module], names: list[str]) -> None:
    loaded = sorted({name for model in components.values() for name in adapters_of(model)})
    for name in names:
        if name not in loaded:
            raise UserError(f"there is no adapter {name!r}; loaded: {', '.join(loaded) or 'none'}")


def _check_weight(components: Mapping[str, nn.Module], name: str, weight: AdapterWeight) -> None:
    parts = weight if isinstance(weight, Mapping) else {"": weight}
    for component, part in parts.items():
        if component and component not in components:
            raise UserError(f"adapter {name!r}: no component {component!r}; choose from {', '.join(components)}")
        if isinstance(part, bool) or not isinstance(part, int | float) or not math.isfinite(part):
            raise UserError(f"adapter {name!r}: a weight must be a finite number, got {part!r}")


def _targets_label(models: Mapping[str, nn.Module], name: str, preset: str) -> str:
    """The preset if it names exactly the adapted layers, else ``custom``."""
    if preset not in PRESETS:
        return "custom"
    for model in models.values():
        try:
            if set(matching_layers(model, preset)) != set(spectral_layers(model, name)):
                return "custom"
        except UserError:
            return "custom"
    return preset
