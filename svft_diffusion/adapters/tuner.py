"""PEFT's tuner for adapters in the singular-value space: finds the layers, decomposes them, wraps them."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from svft_diffusion.adapters.config import SpectralConfig
from svft_diffusion.adapters.layer import SpectralLayer
from svft_diffusion.adapters.methods import LayerOptions, method_named
from svft_diffusion.adapters.names import check_adapter_name
from svft_diffusion.adapters.registration import PREFIX
from svft_diffusion.adapters.targets import matching_layers
from svft_diffusion.errors import UserError
from svft_diffusion.factors import cached_factors
from svft_diffusion.files.names import base_module
from svft_diffusion.spectral import SingularFactors


class SpectralModel(BaseTuner):
    """One tuner for every method; created by PEFT, see ``unet.add_adapter`` and ``peft.get_peft_model``."""

    prefix = PREFIX
    tuner_layer_cls = SpectralLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # targets are named by presets instead

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
        try:
            check_adapter_name(adapter_name)
            # A copy: the targets found here are those of this model, the caller's config may serve another one.
            config = copy.copy(self.peft_config[adapter_name])
            paths = _target_paths(model, config, state_dict)
            self._prepared = {path: prepare_layer(model, path, config) for path in paths}
            self.peft_config[adapter_name] = config
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            self.peft_config.pop(adapter_name, None)
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
        prepared = self._prepared.get(current_key) or prepare_layer(self.model, current_key, peft_config)
        options, factors = prepared
        layer = spectral_layer_of(target)
        if layer is None:
            layer = SpectralLayer(target, factors)
            self._replace_module(parent, target_name, layer, target)
        layer.add_adapter(adapter_name, options, inference_mode=peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)


def prepare_layer(model: nn.Module, path: str, config: SpectralConfig) -> tuple[LayerOptions, SingularFactors]:
    """Options and singular factors of the layer at ``path``; nothing in the model changes.

    Raises:
        UserError: the layer can't carry the adapter: not linear, quantized, fused, too small, or not finite.
    """
    module = model.get_submodule(path)
    options = layer_options(module, path, config)
    layer = spectral_layer_of(module)
    if layer is not None:
        return options, layer.factors
    try:
        return options, cached_factors(base_module(module).weight)  # type: ignore[arg-type]
    except ValueError as problem:
        raise UserError(f"layer {path} can't be decomposed: {problem}") from problem


def layer_options(module: nn.Module, path: str, config: SpectralConfig) -> LayerOptions:
    """What ``config`` means for one layer, after checking that the layer can carry it. Raises as `prepare_layer`."""
    linear = base_module(module)
    if not isinstance(linear, nn.Linear):
        raise UserError(f"layer {path} is a {type(linear).__name__}; {config.method} adapts linear layers only")
    if not linear.weight.is_floating_point():
        raise UserError(f"layer {path} is quantized ({linear.weight.dtype}); load the base model unquantized")
    if any(isinstance(inner, BaseTunerLayer) and inner.merged for inner in module.modules()):
        raise UserError(f"an adapter is fused into layer {path}; call pipe.unfuse_lora() first")
    size = min(linear.weight.shape)
    if config.rank is not None and config.rank > size:
        raise UserError(f"layer {path} has {size} singular values, fewer than rank={config.rank}; use a smaller rank")
    options = LayerOptions(config.method, config.pattern, config.off_diagonals, config.rank or size)
    try:
        method_named(config.method).number_of_values(options)
    except ValueError as problem:
        raise UserError(f"layer {path}: {problem}") from problem
    return options


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
    if config.target_modules is None:
        config.target_modules = set(matching_layers(model, config.targets))
    if state_dict is not None:
        return sorted({key.rsplit(f".{PREFIX}", 1)[0] for key in state_dict})
    if config.target_modules == "all-linear":
        return []  # PEFT expands this one itself, to its own notion of it
    wrappers = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [
        path
        for path, _ in model.named_modules()
        if path and not path.startswith(wrappers) and BaseTuner._check_target_module_exists(config, path)
    ]
