"""The layer that carries adapters in the singular-value space around one frozen layer of any kind."""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from svft_diffusion.adapters.layers import basis, computing
from svft_diffusion.adapters.layers.formula import Inputs, output_for_samples, output_of_formula
from svft_diffusion.adapters.layers.fusing import Folded, Fused, fuse, restore
from svft_diffusion.adapters.layers.kinds import Kind, layer_kind
from svft_diffusion.adapters.layers.parking import Parking
from svft_diffusion.adapters.layers.placement import PlacedFactors, SpreadFactors, identity
from svft_diffusion.adapters.layers.training import TrainingPaths
from svft_diffusion.adapters.methods import LayerOptions, Term, combined_core, initial_values
from svft_diffusion.errors import UserError
from svft_diffusion.files.quantized import is_quantized, weight_shape
from svft_diffusion.files.tensor_names import TRAINED_PARTS
from svft_diffusion.spectral import SingularFactors, probe_update

_logger = logging.getLogger(__name__)
# Not in the layers: a lock can be neither copied nor pickled.
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def _size(name: str) -> property:
    """A size of the frozen layer; no such attribute where that has none."""
    return property(lambda layer: getattr(layer.get_base_layer(), name))


class SpectralLayer(nn.Module, BaseTunerLayer):
    """``y = W x + b + U M V^T x``: a layer with the update of all its active adapters.

    Three ways to the same output: adapters that train run by the kernels of `svft_diffusion.kernels`; frozen ones
    are folded once into a copy of the weight, whatever their number; under ``torch.compile``, and where the base
    weight is no plain matrix, the formula runs as it stands, with strengths as tensors under ``torch.compile``, so
    that no change of weight compiles again.

    ``U``, ``V`` and the singular values exist once, whatever the number of adapters. They are no parameters and no
    buffers, so that state dicts, optimizers and DDP don't see them, and they go to the layer's device only when a
    product needs them. Trained values stay float32 whatever the dtype of the model: small shifts don't survive
    16 bit.

    Attributes:
        keeps_base_apart: whether the base layer computes its part by itself, always: its weight is quantized, or is put
            together from several processes for the time of a call.
    """

    adapter_layer_names = ("spectral_values", "spectral_bias", "spectral_norm", "spectral_gate")
    # Dicts with an entry for each adapter, from which PEFT deletes. diffusers asks for the length of `r`.
    other_param_names = (
        "r", "options", "weights", "weight_tensors", "call_scales", "spectral_positions", "spectral_sketch",
    )  # fmt: skip

    # Pipelines ask their models' layers for these.
    in_features, out_features = _size("in_features"), _size("out_features")
    in_channels, out_channels = _size("in_channels"), _size("out_channels")
    num_embeddings, embedding_dim = _size("num_embeddings"), _size("embedding_dim")

    if TYPE_CHECKING:  # inherited from PEFT, which has no type information
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool

        def get_base_layer(self) -> nn.Module: ...
        def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None: ...
        def enable_adapters(self, enabled: bool) -> None: ...
        def set_requires_grad(self, adapter_names: str, requires_grad: bool = True) -> None: ...

    def __init__(self, base_layer: nn.Module, factors: SingularFactors | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        kind = layer_kind(self.get_base_layer())
        assert kind is not None
        self.kind: Kind = kind
        self.spectral_values = nn.ParameterDict()
        self.spectral_bias = nn.ParameterDict()
        self.spectral_norm = nn.ParameterDict()
        self.spectral_gate = nn.ParameterDict()
        self.spectral_positions = BufferDict(persistent=True)
        self.spectral_sketch = BufferDict(persistent=True)
        self.r: dict[str, int] = {}  # trained singular triplets
        self.options: dict[str, LayerOptions] = {}
        self.weights: dict[str, float] = {}  # set by set_scale, that is by set_adapters
        self.weight_tensors: dict[str, Tensor] = {}  # the same in one place each, for compiled graphs
        self.call_scales: dict[str, list[float]] = {}  # stacked by scale_layer for the time of one call
        self.sample_weights: list[Mapping[str, float]] | None = None  # for each sample of a batch, see runtime
        self.keeps_base_apart = is_quantized(self.get_base_layer())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._fused: Fused | None = None
        self._placed = None if factors is None else PlacedFactors(factors)
        self._folded: Folded | None = None
        self._parking = Parking()
        self._paths = TrainingPaths(self._parking)
        self.register_load_state_dict_post_hook(_align_loaded)

    # What an adapter has in this layer

    @property
    def factors(self) -> SingularFactors | None:
        """Singular factors of the weight as a matrix, float32 on the CPU; None for norms."""
        return None if self._placed is None else self._placed.factors

    @property
    def _weight(self) -> Tensor:
        """The frozen weight, where the layer computes."""
        self._parking.wake(self.get_base_layer())
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 for other layers; PEFT's LoRA asks what it goes around."""
        return int(getattr(self.get_base_layer(), "groups", 1))

    def has_adapter(self, name: str) -> bool:
        """Whether an adapter is in this layer."""
        return name in self.options

    def trained_parts(self, name: str) -> dict[str, nn.Parameter]:
        """What an adapter trains here, by part: some of ``values``, ``bias``, ``norm`` and ``gate``."""
        # Every call of a layer comes here, and a module finds its own attributes slowly.
        holders = cast("dict[str, nn.ParameterDict]", self._modules)
        parts = ((part, holders[f"spectral_{part}"]._parameters.get(name)) for part in TRAINED_PARTS)
        return {part: parameter for part, parameter in parts if parameter is not None}

    def positions(self, name: str) -> Tensor | None:
        """What the pattern lists: flat positions in the core matrix or triplets, int32; None for regular patterns."""
        if name not in self.spectral_positions:
            return None
        positions: Tensor = self.spectral_positions[name]
        return positions

    def term(self, name: str, *, strength: float | Tensor = 1.0, on_cpu: bool = False) -> Term:
        """One adapter's part in this layer, at a strength of its own; ``on_cpu`` gives copies out of autograd."""
        parts: dict[str, Tensor] = dict(self.trained_parts(name))
        positions = self.positions(name)
        if on_cpu:
            parts = {part: tensor.detach().cpu() for part, tensor in parts.items()}
            positions = None if positions is None else positions.cpu()
        return Term(strength, self.options[name], parts, positions)

    def add_adapter(
        self,
        adapter_name: str,
        options: LayerOptions,
        *,
        factors: SingularFactors | None = None,
        positions: Tensor | None = None,
        inference_mode: bool,
    ) -> None:
        """Give the layer another adapter at its initial values; ``positions`` where its pattern lists them."""
        own = computing.parameters_of(self.get_base_layer())
        device = self._weight.device
        if self._placed is None and factors is not None:
            self._placed = PlacedFactors(factors)
        start: dict[str, Tensor] = {}
        if "values" in options.parts:
            start["values"] = initial_values(options)
        if "gate" in options.parts:
            start["gate"] = torch.zeros(1)
        if "bias" in options.parts:
            start["bias"] = torch.zeros_like(own["bias"])
        if "norm" in options.parts:
            start["norm"] = torch.zeros(1) if options.norm_shift == "scalar" else torch.zeros_like(own["weight"])
        for part, values in start.items():
            parameter = nn.Parameter(values.to(device=device, dtype=torch.float32))
            getattr(self, f"spectral_{part}")[adapter_name] = parameter
        if positions is not None:
            self.spectral_positions[adapter_name] = positions.to(device)
        self.r[adapter_name] = options.rank
        self.options[adapter_name] = options
        self.weights[adapter_name] = 1.0
        self.weight_tensors[adapter_name] = torch.ones(())
        self.call_scales[adapter_name] = []
        if "values" in options.parts and self.factors is not None:
            # Without the values: PEFT may have them on the meta device until they are loaded.
            term = Term(1.0, options, {}, positions)
            self.spectral_sketch[adapter_name] = basis.stored_sketch(self.factors, term).to(device)
        self._forget_copies()  # memory of an adapter of this name that was deleted may have been given to this one
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out, and let go of what was made for it."""
        self.wake()
        super().delete_adapter(adapter_name)
        self._forget_copies()

    def allow_parking(self) -> None:
        """From here on, while its adapters train and don't read it, the frozen weight may leave the accelerator."""
        self._parking.allow()
        if self._placed is not None:
            self._placed.page_out_copied()

    def wake(self) -> None:
        """Have the frozen weight where the layer computes, to stay until the next `allow_parking`."""
        self._parking.wake(self.get_base_layer())

    @property
    def has_parked_weight(self) -> bool:
        """Whether the frozen weight is away; who computes with it, calls `wake` before."""
        return self._parking.parked

    @property
    def _awake_base(self) -> nn.Module:
        """What lies inside of this layer, with the frozen weight where it computes."""
        if self._parking.parked:
            self.wake()
        return self.base_layer

    def spread(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Get ready for a base layer whose weight is put together for a call alone, as FSDP does.

        The factors that the adapter stands on become frozen parameters in ``dtype``, so that FSDP spreads them, too.
        It must be the layer's only adapter from then on, on the basis that it has now.
        """
        self.keeps_base_apart = True
        self._forget_copies()
        if self._placed is not None and "values" in self.options[adapter_name].parts:
            triplets = self.term(adapter_name, on_cpu=True).triplets
            self.spread_factors = self._placed.spread = SpreadFactors(self._placed.factors, triplets, dtype)

    # The basis that the values stand on

    def sketch(self, name: str) -> Tensor:
        """Sketch of the basis that an adapter's values stand on, uint8; empty where it has no values here."""
        if name not in self.spectral_sketch:
            return torch.zeros(0, dtype=torch.uint8)
        return basis.trimmed(self.spectral_sketch[name].cpu())

    def align(self, name: str, sketch: Tensor) -> float:
        """Make values that were trained on the basis in ``sketch`` mean the same here.

        Signs of singular vectors, and rotations among nearly equal singular values, follow the sketch: the layer's
        factors where no other adapter stands on them, else the signs of the adapter's values.

        Returns:
            The measured relative error of the basis; 0.0 where nothing had to move.

        Raises:
            ValueError: the sketch is damaged or belongs to a weight of another shape.
        """
        if name not in self.spectral_sketch or self._placed is None:
            return 0.0
        factors, term = self._placed.factors, self.term(name, on_cpu=True)
        own = basis.stored_sketch(factors, term)
        if torch.equal(sketch.cpu(), basis.trimmed(own)):
            self.spectral_sketch[name].copy_(own)  # other triplets may have been copied in, with their values
            return 0.0
        aligned = basis.aligned(factors, sketch.cpu(), term.triplets)
        values = self.spectral_values[name]
        error = aligned.error
        if all(other == name or other not in self.spectral_values for other in self.options):
            self._placed.replace(aligned.factors, exact=self._placed.exact and not aligned.rotated)
            self._paths.forget()
        else:
            with torch.no_grad():
                values.mul_(basis.signs_of_values(term, aligned.signs).to(values))
            error = basis.error_of_signs_alone(factors, aligned, term)
        self.renew_sketch(name)
        self._folded = None
        return error

    def renew_sketch(self, name: str) -> None:
        """Describe the basis as it is now, after other positions were copied in or the factors have changed."""
        assert self._placed is not None
        own = basis.stored_sketch(self._placed.factors, self.term(name, on_cpu=True))
        self.spectral_sketch[name] = own.to(self._weight.device)

    def probes(self, name: str, parts: Mapping[str, Tensor] | None = None) -> Tensor | None:
        """Four numbers (float32) that tell an adapter's update at strength 1; None where it has no values here.

        Args:
            parts: what to take in place of its trained parts, such as the rounded ones that a file holds.
        """
        if name not in self.spectral_values or self.factors is None:
            return None
        U, S, Vh = self.factors
        term = self.term(name, on_cpu=True)
        with torch.no_grad():
            core, triplets = combined_core(S, [replace(term, parts={**term.parts, **(parts or {})})])
            return probe_update(U[:, triplets], core, Vh[triplets])

    # Output

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._awake_base(x, *args, **kwargs)
        if self.merged:
            return self._awake_base(x, *args, **kwargs)
        inputs = Inputs(x, args, kwargs)
        module = self.get_base_layer()
        if self.sample_weights is not None:
            samples = self._terms_of_samples(self.sample_weights)
            if not samples[0]:
                return inputs.give(self._awake_base)
            return output_for_samples(self.kind, module, self._awake_base, self._placed, inputs, samples)
        compiling = torch.compiler.is_compiling()
        terms = self._terms(self.active_adapters, as_tensors=compiling)
        if not terms:  # no active adapter, or all at strength 0: the base, bit for bit
            return inputs.give(self._awake_base)
        if isinstance(self.base_layer, BaseTunerLayer) or compiling or self.keeps_base_apart:
            return output_of_formula(self.kind, module, self._awake_base, self._placed, inputs, terms)
        trains = any(part.requires_grad for term in terms for part in term.parts.values())
        if trains and torch.is_grad_enabled():
            self._folded = None  # of a validation: a second weight in each layer
            return self._paths.output(self.kind, module, self._placed, inputs, terms)
        # The folded weight is in the layer for the time of the call, and another thread would take it for the base's.
        with _locks.setdefault(self, threading.RLock()):
            return inputs.give_with(module, self._folded_parameters(terms))

    def _folded_parameters(self, terms: Sequence[Term]) -> dict[str, Tensor]:
        """Weight and bias with all adapters in them; made anew when one of their tensors has changed."""
        own = computing.parameters_of(self._awake_base)
        parts = [part for term in terms for part in term.parts.values()]
        state = (
            *(identity(tensor) for tensor in (*own.values(), *parts)),
            *(term.strength for term in terms),
        )
        # A training loop may write through `.data`, as averaging of weights does, and no version counter sees that.
        trained = [part.detach() for part in parts if part.requires_grad]
        if self._folded is None or not self._folded.is_of(state, trained):
            self._folded = None  # let go of the old copy before the new one is made
            # What is kept here outlives the call and may serve training next.
            with torch.inference_mode(False), torch.no_grad():
                folded = computing.adapted_parameters(self.kind, own, self.factors, terms)
                self._folded = Folded(folded, state, [part.clone() for part in trained])
        return self._folded.parameters

    # What diffusers asks for: weights of adapters and the scale of one call

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the weight of an adapter."""
        if adapter not in self.weights:
            return
        scales = self.call_scales[adapter]
        if scales and scales[-1] == 0:
            # diffusers ends a call with scale 0 by setting weight 1; the weight from before the call is meant.
            scales.pop()
        else:
            self.weights[adapter] = float(scale)
        self._tell_compiled_graphs(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' weights until the matching `unscale_layer`."""
        for adapter in self.active_adapters:
            if adapter in self.call_scales:
                self.call_scales[adapter].append(float(scale))
                self._tell_compiled_graphs(adapter)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Take back the last `scale_layer`, or all of them when ``scale`` is None."""
        for adapter in self.active_adapters:
            stack = self.call_scales.get(adapter, [])
            if not stack:
                continue
            if scale is None:
                stack.clear()
            else:
                stack.pop()
            self._tell_compiled_graphs(adapter)

    def _tell_compiled_graphs(self, adapter: str) -> None:
        self.weight_tensors[adapter].fill_(self._strength(adapter))

    def _strength(self, adapter: str) -> float:
        return self.weights[adapter] * math.prod(self.call_scales[adapter])

    # Fusing

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the update of the named (default: active) adapters into the base layer; what it had is kept.

        Raises:
            ValueError: with ``safe_merge``, when the fused weight would hold NaN or infinity; nothing is changed.
            UserError: the weight is quantized or spread over processes.
        """
        self._folded = None
        self.wake()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if not names:
            return
        if self.keeps_base_apart:
            raise UserError(
                "a quantized base takes no adapter into its weights; call pipe.unfuse_lora() for the layers that were "
                "fused before this one, and use the adapter as it is loaded"
            )
        merged, base = [*self.merged_adapters, *names], self.get_base_layer()
        before, names_before = self._fused, self.merged_adapters
        # What is fused stays as it was put in: since then its strength may have changed.
        terms = [*(before.terms if before is not None else ()), *self._terms(names)]
        self.unmerge()
        try:
            self._fused = fuse(self.kind, base, self.factors, terms, safe=safe_merge)
        except ValueError as problem:
            if before is not None:
                self._fused = fuse(self.kind, base, self.factors, before.terms, safe=False)
                self.merged_adapters = names_before
            raise ValueError(f"adapters {', '.join(merged)}: {problem}") from problem
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Take fused adapters out again: weight and bias have the bits they had before."""
        self._folded = None
        if self._fused is not None:
            restore(self.kind, self.get_base_layer(), self.factors, self._fused)
        self._fused = None
        self.merged_adapters = []
        for name, stack in self.call_scales.items():
            stack.clear()  # fuse_lora(lora_scale=...) scales and never takes it back
            self._tell_compiled_graphs(name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What one adapter changes in the weight at its present strength; shape of the weight, float32."""
        terms = [term for term in self._terms([adapter]) if term.parts.keys() & {"values", "norm"}]
        if not terms:
            return torch.zeros_like(self._weight, dtype=torch.float32)
        weight = self._weight
        if is_quantized(self.get_base_layer()):  # packed, it has another shape
            weight = torch.empty(weight_shape(self.get_base_layer()), device=weight.device)
        return computing.update_of_weight(self.kind, weight, self.factors, terms)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a LoRA can hold the adapter's part here; PEFT's conversion knows linear layers only."""
        return self.kind == "linear" and self.options[adapter_name].parts <= {"values", "gate"}

    # Inside

    def _terms_of_samples(self, sample_weights: Sequence[Mapping[str, float]]) -> list[list[Term]]:
        """For each sample, the parts of all adapters that some sample uses."""
        names = sorted({name for weights in sample_weights for name in weights if name in self.options})
        return [[self.term(name, strength=weights.get(name, 0.0)) for name in names] for weights in sample_weights]

    def _terms(self, adapter_names: Sequence[str], *, as_tensors: bool = False) -> list[Term]:
        """The parts of the named adapters that this layer has and whose strength is not zero.

        Strengths as tensors are not looked at: a compiled graph must serve them all.
        """
        names = [name for name in adapter_names if name in self.options]
        if as_tensors:
            return [self.term(name, strength=self.weight_tensors[name]) for name in names]
        strengths = {name: self._strength(name) for name in names}
        return [self.term(name, strength=strength) for name, strength in strengths.items() if strength != 0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectralLayer:
        """Behind ``.to``, ``.half``, ``.cuda``: the base layer takes any dtype, the adapters' tensors only move."""

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.wake()
        if recurse:
            for name, child in self.named_children():
                child._apply(fn if name == "base_layer" else move_only)
        self._forget_copies()
        return self

    def _forget_copies(self) -> None:
        self._folded = None
        self._paths.forget()
        if self._placed is not None:
            self._placed.forget_copies()


def _align_loaded(layer: SpectralLayer, incompatible_keys: object) -> None:
    """After a state dict was loaded: its values stand on the basis in its sketch."""
    for name in list(layer.spectral_sketch.keys()):
        error = layer.align(name, layer.sketch(name))
        if error > basis.LARGEST_SILENT_ERROR:
            _logger.warning(
                "adapter %r: singular vectors of a layer differ by %.1e from those it was trained on; "
                "is this the base model it was trained on?", name, error,
            )  # fmt: skip
