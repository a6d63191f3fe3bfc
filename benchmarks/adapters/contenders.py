"""Who takes part: ways to put an adapter on layers of a model, each on its own modules over one set of base weights."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.adapters.peers import CommunitySVDiffConv2d, CommunitySVDiffLinear, OfficialSVFTLinear, TrainableBias
from svft_diffusion.adapters.config import SpectralConfig, SVDiffConfig, SVFTConfig, VectorFitConfig
from svft_diffusion.adapters.training import add_training_adapter
from svft_diffusion.factors import cached_factors_of

FLOOR = "frozen base"
LORA = "LoRA r=4"
LORA_AUTOCAST = "LoRA r=4, fp32 under autocast"
COMMUNITY_SVDIFF = "SVDiff, community code"
OFFICIAL_SVFT = "SVFT, official code"
PLAIN = "ours: SVFT plain"
BANDED = "ours: SVFT banded d=2"
SVDIFF = "ours: SVDiff"
COMPRESSED = "ours: SVFT plain, compressed"

# Puts an adapter on the layers at the given paths, all of whose own parameters are frozen.
Attach = Callable[[nn.Module, Sequence[str]], None]


@dataclass(frozen=True)
class Contender:
    """An adapter that takes part in a measurement.

    Attributes:
        attach: puts the adapter on a model.
        model_precision: keep what trains in the model's dtype (LoRA in 16 bit) instead of float32.
        autocast: run under autocast to the model's dtype whatever the settings say.
    """

    attach: Attach
    model_precision: bool = False
    autocast: bool = False


def linear_contenders(dtype: str) -> dict[str, Contender]:
    """Everybody for linear layers; ``dtype`` is float32, bfloat16 (all in 16 bit) or autocast."""
    pure = dtype == "bfloat16"
    everybody = {
        FLOOR: Contender(_replace_each(TrainableBias), model_precision=True),
        LORA: Contender(_lora(4), model_precision=pure),
        "LoRA r=16": Contender(_lora(16), model_precision=pure),
        "DoRA r=4": Contender(_lora(4, dora=True), model_precision=pure),
        COMMUNITY_SVDIFF: Contender(_replace_each_decomposed(CommunitySVDiffLinear)),
        OFFICIAL_SVFT: Contender(_replace_each_decomposed(OfficialSVFTLinear)),
        PLAIN: Contender(_ours(SVFTConfig)),
        COMPRESSED: Contender(_ours(SVFTConfig, compress_activations=True)),
        BANDED: Contender(_ours(SVFTConfig, pattern="banded", off_diagonals=2)),
        f"{BANDED}, compressed": Contender(
            _ours(SVFTConfig, pattern="banded", off_diagonals=2, compress_activations=True)
        ),
        SVDIFF: Contender(_ours(SVDiffConfig)),
        "ours: VectorFit": Contender(_ours(VectorFitConfig)),
    }
    if pure:
        everybody[LORA_AUTOCAST] = Contender(_lora(4), autocast=True)
    return everybody


def convolution_contenders(dtype: str) -> dict[str, Contender]:
    """Everybody for convolutions. The frozen base has nothing that trains: its input asks for a gradient."""
    pure = dtype == "bfloat16"
    return {
        FLOOR: Contender(lambda model, paths: None),
        LORA: Contender(_lora(4), model_precision=pure),
        COMMUNITY_SVDIFF: Contender(_replace_each_decomposed(CommunitySVDiffConv2d)),
        SVDIFF: Contender(_ours(SVDiffConfig)),
        f"{SVDIFF}, compressed": Contender(_ours(SVDiffConfig, compress_activations=True)),
    }


def chosen(everybody: Mapping[str, Contender], names: Sequence[str]) -> dict[str, Contender]:
    """Those whose name contains one of ``names`` (all, when there are none) and LoRA r=4, the reference."""
    if not names:
        return dict(everybody)
    return {
        name: contender
        for name, contender in everybody.items()
        if name == LORA or any(part.lower() in name.lower() for part in names)
    }


class Entrant:
    """A contender's own copy of a model, ready to train."""

    def __init__(self, contender: Contender, base: nn.Module, paths: Sequence[str], *, autocast: bool) -> None:
        self.model = modules_over_shared_weights(base)
        contender.attach(self.model, paths)
        own = {id(tensor) for tensor in base.parameters()}
        self.trained = [value for value in self.model.parameters() if value.requires_grad and id(value) not in own]
        weight = next(base.parameters())
        for parameter in self.trained:  # PEFT leaves them in the dtype of the base
            parameter.data = parameter.data.to(weight.dtype if contender.model_precision else torch.float32)
        self._autocast = autocast or contender.autocast
        self._device, self._dtype = weight.device, weight.dtype

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """The model's output; the first one, where there are several."""
        context = (
            torch.autocast(self._device.type, dtype=self._dtype)
            if self._autocast and self._dtype != torch.float32
            else contextlib.nullcontext()
        )
        with context:
            result = self.model(*inputs, **named)
        return result if isinstance(result, Tensor) else result[0]

    @torch.no_grad()
    def update(self) -> None:
        """A tiny step of gradient descent: the values change, so that a weight made from them must be made anew."""
        for parameter in self.trained:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-7)
                parameter.grad = None


def modules_over_shared_weights(base: nn.Module) -> nn.Module:
    """A copy of a model's modules that share its parameters and buffers."""
    tensors = itertools.chain(base.parameters(), base.buffers())
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def _lora(rank: int, *, dora: bool = False) -> Attach:
    def attach(model: nn.Module, paths: Sequence[str]) -> None:
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(paths), use_dora=dora, init_lora_weights="gaussian"
        )
        inject_adapter_in_model(config, model, "default")

    return attach


def _ours(config_class: Callable[..., SpectralConfig], **options: object) -> Attach:
    def attach(model: nn.Module, paths: Sequence[str]) -> None:
        add_training_adapter({"unet": model}, config_class(target_modules=list(paths), **options))

    return attach


def _replace_each(layer_class: Callable[..., nn.Module]) -> Attach:
    def attach(model: nn.Module, paths: Sequence[str]) -> None:
        for path in paths:
            _replace(model, path, layer_class(model.get_submodule(path)))

    return attach


def _replace_each_decomposed(layer_class: Callable[..., nn.Module]) -> Attach:
    def attach(model: nn.Module, paths: Sequence[str]) -> None:
        weights = {path: model.get_parameter(f"{path}.weight").detach().flatten(1) for path in paths}
        factors = cached_factors_of(weights, progress=False)
        for path in paths:
            _replace(model, path, layer_class(model.get_submodule(path), factors[path]))

    return attach


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
