"""PEFT's tuner for adapters in the singular-value space: finds the layers, decomposes them, wraps them."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers import PreTrainedModel

from svft_diffusion.adapters.config import SpectralConfig
from svft_diffusion.adapters.injection import remove
from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.adapters.layers.kinds import Kind, layer_kind, matrix_of
from svft_diffusion.adapters.methods import (
    LISTED,
    LayerOptions,
    Triplets,
    initial_positions,
    number_of_values,
    seed_of_layer,
    trained_triplets,
)
from svft_diffusion.adapters.names import check_adapter_name
from svft_diffusion.adapters.registration import PREFIX
from svft_diffusion.adapters.targets import adaptable_layers, matching_layers
from svft_diffusion.errors import UserError
from svft_diffusion.factors import cached_factors_of
from svft_diffusion.files.names import base_module
from svft_diffusion.files.quantized import is_quantized, kept_full_weight, read_full_weight, weight_shape
from svft_diffusion.files.stored_weight import stored_weight
from svft_diffusion.spectral import SingularFactors

_ALL_LINEAR = "all-linear"
_LISTED_LAYERS = 8


class PreparedLayer(NamedTuple):
    """What one layer needs for an adapter."""

    options: LayerOptions
    factors: SingularFactors | None
    positions: Tensor | None


class SpectralModel(BaseTuner):
    """One tuner for every method; created by PEFT, see ``unet.add_adapter`` and ``peft.get_peft_model``."""

    prefix = PREFIX
    tuner_layer_cls = SpectralLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # targets are named by presets instead

    def __init__(
        self,
        model: nn.Module,
        peft_config: SpectralConfig | dict[str, SpectralConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and adapter_name in module._get_available_adapters():
                raise UserError(
                    f"an adapter {adapter_name!r} is already there; remove it first, or give this one another name"
                )
        with warnings.catch_warnings():
            # Meant for models that somebody wraps twice by mistake; a second adapter is no mistake here.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Check and decompose every target first, then let PEFT replace the layers.

        Raises:
            UserError: a name that no adapter can have, or a target can't carry the adapter; the model is as it was.
        """
        trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            check_adapter_name(adapter_name)
            config = self.peft_config[adapter_name]
            if not config.target_modules or config.target_modules == _ALL_LINEAR:
                config = copy.copy(config)  # those found here are this model's, the caller's may serve another
            paths = _target_paths(model, config, state_dict)
            self._prepared = prepare_layers(model, paths, config)
            self.peft_config[adapter_name] = config
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except BaseException:
            remove(model, adapter_name)
            self.peft_config.pop(adapter_name, None)
            for parameter, trained in trains:
                parameter.requires_grad_(trained)
            if not getattr(model, "peft_config", None):  # diffusers and transformers say it beforehand
                model._hf_peft_config_loaded = False  # type: ignore[assignment]
            raise
        finally:
            self._prepared = {}

    def _create_and_replace(
        self,
        peft_config: SpectralConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        prepared = self._prepared.get(current_key)
        if prepared is None:
            prepared = prepare_layers(self.model, [current_key], peft_config)[current_key]
        layer = spectral_layer_of(target)
        if layer is None:
            layer = SpectralLayer(target, prepared.factors)
            self._replace_module(parent, target_name, layer, target)
        layer.add_adapter(
            adapter_name,
            prepared.options,
            factors=prepared.factors,
            positions=prepared.positions,
            inference_mode=peft_config.inference_mode,
        )
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)


def prepare_layers(model: nn.Module, paths: Sequence[str], config: SpectralConfig) -> dict[str, PreparedLayer]:
    """What the layers at ``paths`` need for an adapter; they are decomposed together. Nothing in the model changes.

    Raises:
        UserError: a layer can't carry the adapter: of another kind, fused, too small, not finite, or quantized from a
            weight that is not to be had.
    """
    options: dict[str, LayerOptions] = {}
    triplets: dict[str, Triplets] = {}
    factors: dict[str, SingularFactors] = {}
    to_decompose: dict[str, Tensor] = {}
    for path in paths:
        module = model.get_submodule(path)
        options[path], triplets[path] = layer_options(module, path, config)
        if "values" not in options[path].parts:
            continue
        layer, kept = spectral_layer_of(module), kept_full_weight(base_module(module))
        if layer is not None and layer.factors is not None:
            factors[path] = layer.factors
        elif kept is not None:
            factors[path] = kept.factors
        else:
            to_decompose[path] = _weight_to_decompose(model, path, base_module(module))
    # torchrun and accelerate start a process for each device: one bar stands for all of them.
    factors |= cached_factors_of(to_decompose, progress=os.environ.get("LOCAL_RANK", "0") == "0")
    return {
        path: PreparedLayer(
            options[path],
            factors.get(path),
            initial_positions(options[path], triplets[path], factors[path]) if path in factors else None,
        )
        for path in paths
    }


def layer_options(module: nn.Module, path: str, config: SpectralConfig) -> tuple[LayerOptions, Triplets]:
    """What ``config`` means for one layer, and which of its triplets train, once the layer proved fit for it.

    Raises:
        UserError: as `prepare_layers`.
    """
    base = base_module(module)
    kind = layer_kind(base)
    _check_layer(module, base, kind, path)
    assert kind is not None
    parts, listed_values = _listed_parts(trained_parts(base, kind, config), path, config)
    if not parts:
        raise UserError(f"layer {path} has nothing that would train (no bias, or norms are left out); leave it out")
    seed = seed_of_layer(config.seed, path)
    triplets: Triplets = slice(0, 0)
    try:
        if "values" in parts:
            size = min(weight_shape(base) if is_quantized(base) else matrix_of(kind, base.weight).shape)  # type: ignore[arg-type]
            triplets = trained_triplets(config, size, seed, listed_values)
        options = LayerOptions(
            method=config.method,
            pattern=config.pattern,
            off_diagonals=config.off_diagonals,
            rank=len(triplets) if isinstance(triplets, Tensor) else triplets.stop - triplets.start,
            first=triplets.start if isinstance(triplets, slice) else 0,
            listed_triplets=isinstance(triplets, Tensor),
            init=config.init,
            seed=seed,
            parts=parts,
            norm_shift=config.norm_shift,
            compress=config.compress_activations,
            listed_values=listed_values,
        )
        if "values" in parts:
            number_of_values(options)
    except ValueError as problem:
        raise UserError(f"layer {path}: {problem}") from problem
    return options, triplets


def trained_parts(base: nn.Module, kind: Kind, config: SpectralConfig) -> frozenset[str]:
    """What ``config`` trains in a layer: some of ``values``, ``gate``, ``bias`` and ``norm``."""
    parts = set()
    if kind == "norm":
        parts |= {"norm"} if config.train_norm is not False else set()
    elif config.train_values:
        parts |= {"values", "gate"} if config.init == "official" else {"values"}
    if config.train_bias and isinstance(getattr(base, "bias", None), Tensor):
        parts.add("bias")
    return frozenset(parts)


def _listed_parts(parts: frozenset[str], path: str, config: SpectralConfig) -> tuple[frozenset[str], int]:
    """Of what can train in a layer, what the layer has, and the number of its values if the pattern is listed."""
    if config.pattern != LISTED:
        return parts, 0
    assert config.numbers_of_values is not None
    path = path.replace(".base_layer", "")
    if path not in config.numbers_of_values:
        parts -= {"values", "gate"}
    if path not in config.layers_with_bias:
        parts -= {"bias"}
    return parts, config.numbers_of_values.get(path, 0)


def _check_layer(module: nn.Module, base: nn.Module, kind: Kind | None, path: str) -> None:
    if kind is None:
        raise UserError(f"layer {path} is a {type(base).__name__}, which no adapter here fits; leave it out")
    weight = base.weight
    if not isinstance(weight, Tensor) or (is_quantized(base) and kind != "linear"):
        dtype = getattr(weight, "dtype", type(weight).__name__)
        raise UserError(
            f"layer {path} is quantized ({dtype}), and of quantized layers only linear ones carry adapters; load the "
            "base model unquantized"
        )
    if weight.is_meta:
        raise UserError(f"layer {path} has no values yet (it lies on the meta device); load the weights first")
    if getattr(base, "max_norm", None) is not None:
        raise UserError(f"layer {path} changes its own table as it reads it (max_norm); leave it out")
    if any(isinstance(inner, BaseTunerLayer) and inner.merged for inner in module.modules()):
        raise UserError(f"an adapter is fused into layer {path}; call pipe.unfuse_lora() first")


def _weight_to_decompose(model: nn.Module, path: str, base: nn.Module) -> Tensor:
    """The weight as a matrix: the checkpoint's own values where the model was cast down or quantized from them."""
    kind = layer_kind(base)
    assert kind is not None and isinstance(base.weight, Tensor)
    path = path.replace(".base_layer", "")
    if is_quantized(base):
        return matrix_of(kind, read_full_weight(model, path, base))
    live = base.weight.detach()
    stored = stored_weight(model, path, live)
    return matrix_of(kind, live if stored is None else stored)


def spectral_layer_of(module: nn.Module | None) -> SpectralLayer | None:
    """The spectral layer in a stack of adapter layers (a LoRA may lie around it), or None."""
    inner: Any = module
    while isinstance(inner, nn.Module):
        if isinstance(inner, SpectralLayer):
            return inner
        inner = getattr(inner, "base_layer", None)
    return None


def _target_paths(model: nn.Module, config: SpectralConfig, state_dict: dict[str, Tensor] | None) -> list[str]:
    """Paths of the layers that PEFT is going to replace; resolves a preset into ``config.target_modules``."""
    if state_dict is not None:
        paths = sorted({key.rsplit(f".{PREFIX}", 1)[0] for key in state_dict})
        if not config.target_modules:
            _name_targets(model, config, paths)
        return paths
    if config.target_modules is None:
        _name_targets(model, config, preset_layers(model, config))
    if config.target_modules == _ALL_LINEAR:
        _name_targets(model, config, _all_linear_layers(model))
    paths = sorted(_paths_that_peft_matches(model, config))
    if not paths and config.target_modules != DUMMY_TARGET_MODULES:
        wanted = config.target_modules or ()
        named = repr(wanted) if isinstance(wanted, str) else ", ".join(sorted(wanted))
        raise UserError(
            f"target_modules {named} match no layer of {type(model).__name__}; "
            f"its layers are called {', '.join(list(adaptable_layers(model))[:_LISTED_LAYERS])}"
        )
    return paths


def _all_linear_layers(model: nn.Module) -> list[str]:
    """What PEFT calls ``all-linear``: without the output layer of a language model."""
    output_layer = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [
        path
        for path, kind in adaptable_layers(model).items()
        if kind in ("linear", "conv1d") and model.get_submodule(path) is not output_layer
    ]


def _name_targets(model: nn.Module, config: SpectralConfig, paths: list[str]) -> None:
    """Make ``config.target_modules`` mean these layers to PEFT."""
    config.target_modules = set(paths)
    if _paths_that_peft_matches(model, config) != set(paths):  # a path that other paths end like
        config.target_modules = "|".join(re.escape(path) for path in paths)


def layers_to_adapt(model: nn.Module, config: SpectralConfig) -> list[str]:
    """Paths of the layers of a model without adapters that ``config`` asks for. Raises `UserError` if there is none."""
    return _target_paths(model, copy.copy(config), None)


def preset_layers(model: nn.Module, config: SpectralConfig) -> list[str]:
    """Layers that the preset names and in which something trains."""
    matched = matching_layers(model, config.targets, train_norm=config.train_norm)
    paths = []
    for path in matched:
        base = base_module(model.get_submodule(path))
        kind = layer_kind(base)
        if kind is not None and trained_parts(base, kind, config):
            paths.append(path)
    if not paths:
        raise UserError(f"targets {config.targets!r} match {len(matched)} layers, but none has a bias or norm to train")
    return paths


def _paths_that_peft_matches(model: nn.Module, config: SpectralConfig) -> set[str]:
    wrappers = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {
        path
        for path, _ in model.named_modules()
        if path and not path.startswith(wrappers) and BaseTuner._check_target_module_exists(config, path)
    }
