"""How strongly each adapter acts: on a whole pipeline, a component, a block, or one sample of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from svft_diffusion.adapters.injection import adapters_of
from svft_diffusion.adapters.layer_index import indexed_layers
from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import canonical_name, components_of, module_path

# Module path -> weight of the layers below it; the longest path that leads to a layer counts, "" leads to all.
BlockWeights = Mapping[str, float]
# One weight for the whole adapter, or one for each component, or for blocks of it.
AdapterWeight = float | Mapping[str, float | BlockWeights]

_LISTED_BLOCKS = 12


def set_adapters(pipe: object, weights: Mapping[str, AdapterWeight]) -> None:
    """Choose the adapters that act and their weights; what is not mentioned is off. Weight 0 is off, bit for bit.

    ``{"dog": 0.8}`` is one weight for the adapter. ``{"dog": {"unet": 0.5, "text_encoder": 0.2}}`` has one for each
    component; components left out are off. ``{"dog": {"unet": {"down_blocks": 0.5, "up_blocks.1": 0.8, "": 1.0}}}``
    has one for each block, by module path: the longest path that leads to a layer counts, ``""`` leads to all, and
    layers that no path leads to are off.

    Raises:
        UserError: unknown adapter, component or block, a weight that is no finite number, or an adapter is fused;
            nothing is changed then.
    """
    _check_mapping(weights)
    components = components_of(pipe)
    layers = {component: indexed_layers(model) for component, model in components.items()}
    check_loaded(components, weights)
    by_layer = {name: _weights_by_layer(components, layers, name, weight) for name, weight in weights.items()}
    _refuse_fused(layers, "change weights")
    names = list(weights)
    for component, component_layers in layers.items():
        for position, layer in enumerate(component_layers.values()):
            layer.unscale_layer()
            if layer.active_adapters != names:
                layer.set_adapter(names, inference_mode=True)
            for name in names:
                layer.set_scale(name, by_layer[name][component][position])


@contextmanager
def per_sample_adapters(pipe: object, weights: Sequence[Mapping[str, AdapterWeight]]) -> Iterator[None]:
    """Within the context, sample ``i`` of every batch uses the adapters and weights ``weights[i]``, on one pass.

    A batch of a multiple of ``len(weights)`` samples repeats the list: with classifier-free guidance a pipeline
    calls its denoiser with all samples twice. The text encoder sees prompts, not pictures: where it is adapted, give
    one prompt for each sample instead of ``num_images_per_prompt``.

    Raises:
        UserError: as `set_adapters`, or ``weights`` is empty; nothing is changed then.
    """
    if not weights:
        raise UserError("weights of adapters are needed for at least one sample")
    for of_sample in weights:
        _check_mapping(of_sample)
    components = components_of(pipe)
    layers = {component: indexed_layers(model) for component, model in components.items()}
    samples = []
    for sample in weights:
        check_loaded(components, sample)
        samples.append({name: _weights_by_layer(components, layers, name, weight) for name, weight in sample.items()})
    _refuse_fused(layers, "use adapters per sample")
    before = [(layer, layer.sample_weights) for by_path in layers.values() for layer in by_path.values()]
    try:
        for component, component_layers in layers.items():
            for position, layer in enumerate(component_layers.values()):
                layer.sample_weights = [
                    {name: by_layer[component][position] for name, by_layer in sample.items()} for sample in samples
                ]
        yield
    finally:
        for layer, sample_weights in before:
            layer.sample_weights = sample_weights


def layers_with_weights(
    pipe: object, weights: Mapping[str, AdapterWeight]
) -> dict[str, list[tuple[SpectralLayer, dict[str, float]]]]:
    """Component -> each of its layers with the weights that `set_adapters` would give it; nothing is changed.

    Raises:
        UserError: as `set_adapters`.
    """
    _check_mapping(weights)
    components = components_of(pipe)
    layers = {component: indexed_layers(model) for component, model in components.items()}
    check_loaded(components, weights)
    _refuse_fused(layers, "change weights")
    by_layer = {name: _weights_by_layer(components, layers, name, weight) for name, weight in weights.items()}
    return {
        component: [
            (layer, {name: by_layer[name][component][position] for name in weights if layer.has_adapter(name)})
            for position, layer in enumerate(by_path.values())
        ]
        for component, by_path in layers.items()
    }


def weights_in_layers(pipe: object, name: str, weight: AdapterWeight) -> dict[str, float]:
    """Canonical name of each layer that carries adapter ``name`` -> the weight that `set_adapters` would give it there.

    Raises:
        UserError: as `set_adapters`.
    """
    components = components_of(pipe)
    layers = {component: indexed_layers(model) for component, model in components.items()}
    check_loaded(components, [name])
    by_component = _weights_by_layer(components, layers, name, weight)
    return {
        canonical_name(component, components[component], path): by_component[component][position]
        for component, by_path in layers.items()
        for position, (path, layer) in enumerate(by_path.items())
        if layer.has_adapter(name)
    }


def check_loaded(components: Mapping[str, nn.Module], names: Mapping[str, object] | Sequence[str]) -> None:
    """Raise `UserError` if one of the adapters is not in any of the models."""
    layers = [layer for model in components.values() for layer in indexed_layers(model).values()]
    for name in names:
        if not any(layer.has_adapter(name) for layer in layers):
            loaded = sorted({other for model in components.values() for other in adapters_of(model)})
            raise UserError(f"there is no adapter {name!r}; loaded: {', '.join(loaded) or 'none'}")


def _refuse_fused(layers: Mapping[str, Mapping[str, SpectralLayer]], action: str) -> None:
    for component_layers in layers.values():
        for path, layer in component_layers.items():
            if layer.merged:
                fused = ", ".join(layer.merged_adapters)
                raise UserError(f"can't {action} while {fused} is fused (layer {path}); call pipe.unfuse_lora() first")


def _check_mapping(weights: object) -> None:
    if not isinstance(weights, Mapping):
        raise UserError(f"adapters are given with their weights, such as {{'dog': 1.0}}; got {weights!r}")


def _weights_by_layer(
    components: Mapping[str, nn.Module],
    layers: Mapping[str, Mapping[str, SpectralLayer]],
    name: str,
    weight: AdapterWeight,
) -> dict[str, list[float]]:
    """Component -> the weight that adapter ``name`` gets in each of its layers, in their order."""
    if not isinstance(weight, Mapping):
        number = _checked(name, weight)
        return {component: [number] * len(paths) for component, paths in layers.items()}
    for component in weight:
        if component not in components:
            raise UserError(f"adapter {name!r}: no component {component!r}; choose from {', '.join(components)}")
    by_layer = {}
    for component, component_layers in layers.items():
        part = weight.get(component, 0.0)
        if isinstance(part, Mapping):
            blocks = {module_path(components[component], f"{path}.")[:-1]: part[path] for path in part}
            by_layer[component] = _weights_by_block(name, component, component_layers, blocks)
        else:
            by_layer[component] = [_checked(name, part)] * len(component_layers)
    return by_layer


def _weights_by_block(
    name: str, component: str, layers: Mapping[str, SpectralLayer], blocks: BlockWeights
) -> list[float]:
    """The weight of each layer: that of the longest path in ``blocks`` that leads to it."""
    checked = {f"{block}." if block else "": _checked(name, weight) for block, weight in blocks.items()}
    longest_first = sorted(checked, key=len, reverse=True)
    adapted = [f"{path}." for path, layer in layers.items() if layer.has_adapter(name)]
    for prefix in longest_first:
        if not any(path.startswith(prefix) for path in adapted):
            raise UserError(
                f"adapter {name!r} has no layer below {prefix[:-1]!r} in the {component}; "
                f"choose from {_some_blocks(adapted)}"
            )
    return [
        next((checked[prefix] for prefix in longest_first if f"{path}.".startswith(prefix)), 0.0) for path in layers
    ]


def _some_blocks(adapted: Sequence[str]) -> str:
    """Blocks of the adapted layers, one or two levels deep."""
    prefixes = [path.split(".")[:depth] for depth in (1, 2) for path in adapted]
    blocks = list(dict.fromkeys(".".join(prefix) for prefix in prefixes))
    return ", ".join(blocks[:_LISTED_BLOCKS])


def _checked(name: str, weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UserError(f"adapter {name!r}: a weight must be a finite number, got {weight!r}")
    return float(weight)
