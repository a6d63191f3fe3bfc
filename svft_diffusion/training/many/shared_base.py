"""A base model that trains one adapter after another: what a run changed is undone, and found to be undone."""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from svft_diffusion.adapters import unload_adapter
from svft_diffusion.errors import UserError
from svft_diffusion.training.base import is_base_for, load_base
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.run import ADAPTER_NAME

_COUNTED_AS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class BaseUnavailable(UserError):
    """The base model can't be loaded, for whichever subject."""


class SharedBase:
    """Loads the base model once and lends it to run after run.

    Attributes:
        seconds: that loading has taken, all times together.
        times_loaded: more than once only where a run left something that could not be undone, or adapts quantized
            layers whose full weights were not kept.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.times_loaded = 0
        self._pipeline: DiffusionPipeline | None = None
        self._before: _State | None = None

    def lend(self, config: TrainingConfig, dtype: torch.dtype) -> DiffusionPipeline:
        """The base model as it was loaded; `take_back` comes before the next call.

        Raises:
            BaseUnavailable: it can't be loaded.
        """
        if self._pipeline is not None and not is_base_for(config, self._pipeline):
            self._pipeline = self._before = None
        if self._pipeline is None:
            started = time.perf_counter()
            try:
                self._pipeline = load_base(config, dtype)
            except UserError as problem:
                raise BaseUnavailable(str(problem)) from problem
            self._before = _State.of(self._pipeline)
            self.times_loaded += 1
            self.seconds += time.perf_counter() - started
        return self._pipeline

    def take_back(self) -> bool:
        """Undo what the run changed, and say whether every weight is what it was; if not, it will be loaded again."""
        if self._pipeline is None or self._before is None:
            return True
        with contextlib.suppress(UserError):  # a run that ended early has added none
            unload_adapter(self._pipeline, ADAPTER_NAME)
        self._before.restore(self._pipeline)
        intact = _sums(self._pipeline) == self._before.sums
        if not intact:
            self._pipeline = self._before = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        torch._dynamo.reset()  # what was compiled for this run counts against the limit of the next
        return intact


@dataclass(frozen=True)
class _State:
    """Of a pipeline: all that is no weight, to put it back, and sums over weights, to see that they are the same."""

    attributes: dict[nn.Module, dict[str, Any]]
    trains: dict[nn.Parameter, bool]
    dtypes: dict[str, torch.dtype]  # by component
    scheduler: Any
    sums: dict[str, object]

    @classmethod
    def of(cls, pipeline: DiffusionPipeline) -> _State:
        models = _models(pipeline)
        modules = [module for model in models.values() for module in model.modules()]
        parameters = [parameter for model in models.values() for parameter in model.parameters()]
        return cls(
            attributes={module: {name: _copied(value) for name, value in vars(module).items()} for module in modules},
            trains={parameter: parameter.requires_grad for parameter in parameters},
            dtypes={component: _dtype_of(model) for component, model in models.items()},
            scheduler=copy.deepcopy(pipeline.scheduler),
            sums=_sums(pipeline),
        )

    def restore(self, pipeline: DiffusionPipeline) -> None:
        """Modules, hooks, modes, attention, checkpointing and compilation, what trains, precisions, the scheduler."""
        for module, attributes in self.attributes.items():
            vars(module).clear()
            vars(module).update({name: _copied(value) for name, value in attributes.items()})
        for parameter, trained in self.trains.items():
            parameter.requires_grad_(trained)
            parameter.grad = None
        for component, model in _models(pipeline).items():
            if _dtype_of(model) != self.dtypes[component]:
                model.to(self.dtypes[component])  # widened by the run, so that nothing is lost
        pipeline.scheduler = copy.deepcopy(self.scheduler)


def _models(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in sorted(pipeline.components.items()) if isinstance(part, nn.Module)}


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(tensor.dtype for tensor in model.parameters() if tensor.is_floating_point())


def _copied(value: Any) -> Any:
    """The tables of a module (its parameters, children, hooks) are changed in place; what they hold is not."""
    return value.copy() if type(value) in (dict, OrderedDict) else value


def _sums(pipeline: DiffusionPipeline) -> dict[str, object]:
    """Of every weight the sum of its bits, taken as whole numbers, and of every tokenizer the number of its words.

    A single weight that changes changes its sum. That is read at the speed of memory, several times faster than a
    cryptographic digest, and nobody means to deceive here.
    """
    sums: dict[str, object] = {
        name: len(part) for name, part in pipeline.components.items() if hasattr(part, "get_vocab")
    }
    for component, model in _models(pipeline).items():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            sums[f"{component}.{name}"] = (tensor.dtype, tensor.shape, _sum_of_bits(tensor))
    return sums


def _sum_of_bits(tensor: Tensor) -> object:
    if hasattr(tensor, "__tensor_flatten__"):  # quantized, of several tensors
        parts, _ = tensor.__tensor_flatten__()
        return tuple(_sum_of_bits(getattr(tensor, part)) for part in parts)
    whole = tensor.detach().contiguous().view(-1).view(_COUNTED_AS[tensor.element_size()])
    return int(whole.sum(dtype=torch.int64))
