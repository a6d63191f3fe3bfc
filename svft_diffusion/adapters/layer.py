"""The layer that carries adapters in the singular-value space around one frozen linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from svft_diffusion.adapters.methods import LayerOptions, Term, combined_core, method_named
from svft_diffusion.spectral import SingularFactors, apply_core, core_update

_FUSED_SAMPLES = 1024


class SpectralLayer(nn.Module, BaseTunerLayer):
    """``y = W x + b + U M V^T x``: the base layer's own output plus the update of all active adapters.

    ``U``, ``V`` and the singular values exist once, whatever the number of adapters. They are no parameters and no
    buffers, so that state dicts, optimizers and DDP don't see them; they follow the layer from device to device.
    Trained values stay float32 whatever the dtype of the model: small shifts don't survive 16 bit.
    """

    adapter_layer_names = ("spectral_values",)
    # Dicts with an entry for each adapter, from which PEFT deletes. diffusers asks for the length of `r`.
    other_param_names = ("r", "options", "weights", "call_scales")

    if TYPE_CHECKING:  # inherited from PEFT, which has no type information
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool

        def get_base_layer(self) -> nn.Linear: ...
        def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None: ...
        def enable_adapters(self, enabled: bool) -> None: ...
        def delete_adapter(self, adapter_name: str) -> None: ...
        def set_requires_grad(self, adapter_names: str, requires_grad: bool = True) -> None: ...

    def __init__(self, base_layer: nn.Module, factors: SingularFactors) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.spectral_values = nn.ParameterDict()
        self.r: dict[str, int] = {}  # kept singular triplets
        self.options: dict[str, LayerOptions] = {}
        self.weights: dict[str, float] = {}  # set by set_scale, that is by set_adapters
        self.call_scales: dict[str, list[float]] = {}  # stacked by scale_layer for the time of one call
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._kept_weight: Tensor | None = None  # the base weight while adapters are fused into it
        self._fused_core: Tensor | None = None
        self._fused_sample: Tensor | None = None
        self._factors = factors.to(self.get_base_layer().weight.device)
        self._cast_factors: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    @property
    def factors(self) -> SingularFactors:
        """Singular factors of the base weight, float32."""
        return self._factors

    def add_adapter(self, adapter_name: str, options: LayerOptions, *, inference_mode: bool) -> None:
        """Give the layer another adapter, with all values zero."""
        number = method_named(options.method).number_of_values(options)
        device = self.get_base_layer().weight.device
        self.spectral_values[adapter_name] = nn.Parameter(torch.zeros(number, dtype=torch.float32, device=device))
        self.r[adapter_name] = options.rank
        self.options[adapter_name] = options
        self.weights[adapter_name] = 1.0
        self.call_scales[adapter_name] = []
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        terms = self._terms(self.active_adapters)
        if not terms:  # no active adapter, or all at strength 0: the base, bit for bit
            return result
        core = combined_core(self._factors.S, terms)
        U, Vh = self._factors_for(x)
        rank = core.shape[0]
        z = functional.linear(x, Vh[:rank])
        update = functional.linear(apply_core(z, core).to(U.dtype), U[:, :rank])
        return result + update.to(result.dtype)

    # What diffusers asks for: weights of adapters and the scale of one call

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the weight of an adapter."""
        if adapter not in self.weights:
            return
        if self.call_scales[adapter] and self.call_scales[adapter][-1] == 0:
            # diffusers ends a call with scale 0 by setting weight 1; the weight from before the call is meant.
            self.call_scales[adapter].pop()
            return
        self.weights[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' weights until the matching `unscale_layer`."""
        for adapter in self.active_adapters:
            if adapter in self.call_scales:
                self.call_scales[adapter].append(float(scale))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Take back the last `scale_layer`, or all of them when ``scale`` is None."""
        for adapter in self.active_adapters:
            stack = self.call_scales.get(adapter, [])
            if scale is None:
                stack.clear()
            elif stack:
                stack.pop()

    # Fusing

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the update of the named (default: active) adapters into the base weight; the weight itself is kept.

        Raises:
            ValueError: with ``safe_merge``, when the fused weight would hold NaN or infinity; nothing is changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spectral_values]
        if not names:
            return
        weight = self.get_base_layer().weight.data
        kept = weight.clone() if self._kept_weight is None else self._kept_weight
        merged = [*self.merged_adapters, *names]
        terms = self._terms(merged)
        with torch.no_grad():
            core = combined_core(self._factors.S, terms) if terms else None
            fused = self._fused(kept, core)
        if safe_merge and not torch.isfinite(fused).all():
            raise ValueError(f"adapters {', '.join(merged)} would put NaN or infinity into the weight")
        weight.copy_(fused)
        self._kept_weight, self._fused_core, self._fused_sample = kept, core, _sample(fused)
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Take fused adapters out again: the base weight has the bits it had before."""
        if self._kept_weight is None or self._fused_sample is None:
            return
        weight = self.get_base_layer().weight.data
        if torch.equal(_sample(weight), self._fused_sample.to(weight)):
            weight.copy_(self._kept_weight)
        else:  # somebody else, a LoRA around this layer, fused into the same weight: take out our part alone
            ours = self._fused(self._kept_weight, self._fused_core).float() - self._kept_weight.float()
            weight.sub_(ours.to(weight))
        self._kept_weight = self._fused_core = self._fused_sample = None
        self.merged_adapters = []
        for stack in self.call_scales.values():
            stack.clear()  # fuse_lora(lora_scale=...) scales and never takes it back

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Dense update (m, n) of one adapter at its present strength, float32."""
        terms = self._terms([adapter])
        if not terms:
            return torch.zeros_like(self.get_base_layer().weight, dtype=torch.float32)
        return core_update(self._factors.U, combined_core(self._factors.S, terms), self._factors.Vh)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _fused(self, weight: Tensor, core: Tensor | None) -> Tensor:
        if core is None:
            return weight.clone()
        factors = self._factors.to(weight.device)
        return (weight.float() + core_update(factors.U, core.to(weight.device), factors.Vh)).to(weight.dtype)

    def _terms(self, adapter_names: Sequence[str]) -> list[Term]:
        """The parts of the named adapters that this layer has and whose strength is not zero."""
        terms = []
        for name in adapter_names:
            if name not in self.spectral_values:
                continue
            strength = self.weights[name] * math.prod(self.call_scales[name])
            if strength != 0:
                terms.append(Term(self.spectral_values[name], strength, self.options[name]))
        return terms

    def _factors_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``U`` and ``Vh`` on the device of ``x`` in the dtype of the matrix products with it; cast once."""
        if self._factors.U.device != x.device:
            with torch.inference_mode(False):  # what is kept here outlives the call and may serve training next
                self._factors = self._factors.to(x.device)
            self._cast_factors.clear()
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if dtype == torch.float32:
            return self._factors.U, self._factors.Vh
        if dtype not in self._cast_factors:
            with torch.inference_mode(False):
                self._cast_factors[dtype] = (self._factors.U.to(dtype), self._factors.Vh.to(dtype))
        return self._cast_factors[dtype]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectralLayer:
        """Behind ``.to``, ``.half``, ``.cuda``: the base layer takes any dtype, values and factors only move."""

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            self.base_layer._apply(fn)
            self.spectral_values._apply(move_only)
        self._factors = SingularFactors(*(move_only(factor) for factor in self._factors))
        self._cast_factors.clear()
        return self


def _sample(weight: Tensor) -> Tensor:
    """Some elements spread over a weight, enough to notice that another adapter was added to it."""
    flat = weight.reshape(-1)
    return flat[:: max(1, flat.numel() // _FUSED_SAMPLES)].clone()
