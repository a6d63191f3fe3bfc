"""Adapters at work: blending several, changing a weight, swapping one for another, a merged model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks.adapters.config import BenchmarkConfig
from benchmarks.adapters.contenders import modules_over_shared_weights
from benchmarks.adapters.results import Bar, Result
from benchmarks.adapters.timing import interleaved, stopwatch
from benchmarks.adapters.unet import random_unet, unet_inputs
from svft_diffusion import SVFTConfig, load_adapter, save_adapter, set_adapters, unload_adapter
from svft_diffusion.adapters.injection import inject, spectral_layers
from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.files import AdapterMetadata

TARGETS = "attention"
NUMBERS = (1, 2, 4, 8)
_REBUILD = "rebuild of all attention weights"
_CHANGE = "change of a weight: the call"
_CHANGE_AND_FORWARD = "change of a weight: the call and the next forward"
_SWAP = "swap of an adapter in a file for another"
_MERGED = "forward of a merged model"
_LORA = "LoRA r=4, diffusers"
_DIFFERENCE = "relative difference to unmerged"


def measure(config: BenchmarkConfig) -> list[Result]:
    """Everything on the random UNet of Stable Diffusion 1.5, attention layers, in inference."""
    base = random_unet(config)
    ours: Any = modules_over_shared_weights(base)
    for index in range(max(NUMBERS)):
        _add_random_adapter(ours, f"a{index}", index)
    lora: Any = modules_over_shared_weights(base)  # diffusers adds methods to models
    for index in range(2):
        lora.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), f"a{index}")
    lora.requires_grad_(False)
    inputs = unet_inputs(config, 8 if config.quick else 32, 1)
    with torch.no_grad():
        return [
            *_blends(config, ours),
            *_weight_changes(config, ours, lora, inputs),
            *_merged_forward(config, base, ours, inputs),
            *_swaps(config, ours),
        ]


def bars(results: Iterable[Result]) -> list[Bar]:
    """The bars on blending and merging."""
    return [
        Bar("blending", _REBUILD, _blend_of(4), 1.1, _blend_of(1)),
        Bar("blending", _REBUILD, _blend_of(8), 1.1, _blend_of(1)),
        Bar("blending", _CHANGE, "ours", 0.5, _LORA),
        Bar("blending", _MERGED, "merged", 1.02, "base", at_least=0.98),
        Bar("blending", _MERGED, "merged", 1e-5, quantity=_DIFFERENCE),
    ]


def _blends(config: BenchmarkConfig, model: nn.Module) -> list[Result]:
    """Folding 1, 2, 4, 8 active adapters into every weight; taking them out again is not timed."""
    layers = list(spectral_layers(model).values())

    def prepare(number: int) -> None:
        for layer in layers:
            layer.unmerge()
        set_adapters({"unet": model}, {f"a{index}": 0.5 for index in range(number)})

    seconds = interleaved(
        {_blend_of(number): partial(_merge_all, layers) for number in NUMBERS},
        config.rounds,
        stopwatch(config.torch_device),
        before={_blend_of(number): partial(prepare, number) for number in NUMBERS},
    )
    prepare(1)
    return [Result("blending", _REBUILD, name, values) for name, values in seconds.items()]


def _weight_changes(config: BenchmarkConfig, ours: Any, lora: Any, inputs: Mapping[str, Tensor]) -> list[Result]:
    """A slider is moved: the call alone, and with the forward after it, in which ours folds its weights anew."""
    weights = {"ours": 0.0, _LORA: 0.0, "ours, through diffusers": 0.0}

    def move(name: str, change: Callable[[float], object]) -> None:
        weights[name] = (weights[name] + 0.01) % 1.0
        change(0.2 + weights[name])

    changes: dict[str, Callable[[], None]] = {
        "ours": partial(move, "ours", lambda weight: set_adapters({"unet": ours}, {"a0": weight, "a1": 0.5})),
        "ours, through diffusers": partial(
            move, "ours, through diffusers", lambda weight: ours.set_adapters(["a0", "a1"], [weight, 0.5])
        ),
        _LORA: partial(move, _LORA, lambda weight: lora.set_adapters(["a0", "a1"], [weight, 0.5])),
    }
    watch = stopwatch(config.torch_device)
    results = [
        Result("blending", _CHANGE, name, values) for name, values in interleaved(changes, config.rounds, watch).items()
    ]

    def change_and_run(name: str, model: nn.Module) -> None:
        changes[name]()
        model(**inputs)

    calls = {
        "ours": partial(change_and_run, "ours", ours),
        _LORA: partial(change_and_run, _LORA, lora),
        "ours, weight unchanged": partial(ours, **inputs),
        "LoRA r=4, weight unchanged": partial(lora, **inputs),
    }
    seconds = interleaved(calls, config.rounds, watch)
    return results + [Result("blending", _CHANGE_AND_FORWARD, name, values) for name, values in seconds.items()]


def _merged_forward(
    config: BenchmarkConfig, base: nn.Module, ours: nn.Module, inputs: Mapping[str, Tensor]
) -> list[Result]:
    """A merged copy with weights of its own against the base, which ours shares while nothing is merged into it."""
    unmerged = ours(**inputs)[0].float()
    before = base(**inputs)[0].float()
    with _own_weights(ours):
        _merge_all(spectral_layers(ours).values())
        merged = ours(**inputs)[0].float()
        seconds = interleaved(
            {"base": partial(base, **inputs), "merged": partial(ours, **inputs)},
            config.rounds,
            stopwatch(config.torch_device),
        )
        for layer in spectral_layers(ours).values():
            layer.unmerge()
    figures = {
        _DIFFERENCE: float((merged - unmerged).norm() / unmerged.norm()),
        "relative difference to the base": float((unmerged - before).norm() / before.norm()),
    }
    return [
        Result("blending", _MERGED, "base", seconds["base"]),
        Result("blending", _MERGED, "merged", seconds["merged"], figures=figures),
    ]


class _own_weights:
    """Gives the adapted layers of a model weights of their own for a while, so that merging leaves the base alone."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[Any] = [layer.get_base_layer() for layer in spectral_layers(model).values()]
        self._shared = [module.weight for module in self._modules]

    def __enter__(self) -> None:
        for module, weight in zip(self._modules, self._shared, strict=True):
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)

    def __exit__(self, *problem: object) -> None:
        for module, weight in zip(self._modules, self._shared, strict=True):
            module.weight = weight


def _swaps(config: BenchmarkConfig, ours: nn.Module) -> list[Result]:
    """Unload one adapter, load another from its file, with the singular factors in the layers already."""
    pipe = {"unet": ours}
    with tempfile.TemporaryDirectory() as folder:
        metadata = AdapterMetadata(base_name="random weights")
        files = [
            save_adapter(pipe, f"a{index}", Path(folder) / f"a{index}.safetensors", metadata=metadata)
            for index in range(2)
        ]
        for index in range(2, max(NUMBERS)):
            unload_adapter(pipe, f"a{index}")
        loaded = [0]

        def swap() -> None:
            unload_adapter(pipe, f"a{loaded[0]}")
            loaded[0] = 1 - loaded[0]
            load_adapter(pipe, files[loaded[0]], f"a{loaded[0]}")

        unload_adapter(pipe, "a1")
        seconds = interleaved({"ours": swap}, config.rounds, stopwatch(config.torch_device))
    return [Result("blending", _SWAP, "ours", seconds["ours"])]


def _blend_of(number: int) -> str:
    return f"blend of {number}"


def _merge_all(layers: Iterable[SpectralLayer]) -> None:
    for layer in layers:
        layer.merge()


def _add_random_adapter(model: nn.Module, name: str, seed: int) -> None:
    """An adapter for inference whose values change the picture: a tenth of each layer's singular values."""
    inject(model, SVFTConfig(targets=TARGETS), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in spectral_layers(model, name).values():
            values = layer.spectral_values[name]
            factors = layer.factors
            assert factors is not None  # these are linear layers
            random = torch.randn(len(factors.S), generator=generator).to(values.device)
            values.copy_(0.1 * factors.S.to(values.device) * random)
            layer.set_adapter([name], inference_mode=True)
