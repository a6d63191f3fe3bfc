"""Who trains beside whom, and under which common settings; LoRA takes the place of our adapter in a run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.adapters.targets import matching_layers
from svft_diffusion.adapters.training import adapter_parameters
from svft_diffusion.training import setup

SAME_LAYERS, ATTENTION = "attention+feed-forward", "attention"


@dataclass(frozen=True)
class Case:
    """What all contenders have in common."""

    batch_size: int
    precision: str
    checkpointing: bool
    resolution: int

    def __str__(self) -> str:
        precision = "float32" if self.precision == "no" else self.precision
        checkpointing = ", gradient checkpointing" if self.checkpointing else ""
        return f"batch {self.batch_size}, {precision}, {self.resolution // 8}x{self.resolution // 8}{checkpointing}"


@dataclass(frozen=True)
class Contender:
    """Who trains.

    Attributes:
        settings: of the adapter.
        lora_rank: PEFT's LoRA of this rank on the layers of ``targets``; 0: one of ours.
    """

    targets: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lora_rank: int = 0


CONTENDERS = {
    "LoRA r=4": Contender(SAME_LAYERS, lora_rank=4),
    "LoRA r=4, attention": Contender(ATTENTION, lora_rank=4),
    "SVFT plain": Contender(SAME_LAYERS),
    "SVFT plain, attention": Contender(ATTENTION),
    "SVFT plain, compressed": Contender(SAME_LAYERS, {"compress_activations": True}),
    "SVFT banded": Contender(SAME_LAYERS, {"pattern": "banded"}),
    "SVDiff": Contender(SAME_LAYERS, {"method": "svdiff"}),
    "VectorFit": Contender(SAME_LAYERS, {"method": "vectorfit"}),
    "SIVA": Contender(SAME_LAYERS, {"method": "siva"}),
}
PEERS = {SAME_LAYERS: "LoRA r=4", ATTENTION: "LoRA r=4, attention"}
"""By layers that are trained: whom a contender is compared with."""


@contextlib.contextmanager
def as_contender(name: str, on_base: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While entered, runs that are prepared get the adapter of a contender.

    Args:
        on_base: called when the base model is loaded and has no adapter yet.
    """
    contender = CONTENDERS[name]

    def add_adapter(models: dict[str, nn.Module], wanted: Any, adapter_name: str) -> list[nn.Parameter]:
        on_base()
        if not contender.lora_rank:
            return add_training_adapter(models, wanted, adapter_name)
        for model in models.values():
            layers = list(matching_layers(model, contender.targets))
            lora = LoraConfig(r=contender.lora_rank, lora_alpha=contender.lora_rank, target_modules=layers)
            inject_adapter_in_model(lora, model, adapter_name)
        trained = [value for model in models.values() for value in model.parameters() if value.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()  # as ours, and as PEFT does by itself
        return trained

    def parameters_of(models: dict[str, nn.Module], adapter_name: str) -> dict[str, nn.Parameter]:
        if not contender.lora_rank:
            return adapter_parameters(models, adapter_name)
        return {
            f"{component}.{path}.values": parameter
            for component, model in models.items()
            for path, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    with (
        mock.patch.object(setup, "add_training_adapter", add_adapter),
        mock.patch.object(setup, "adapter_parameters", parameters_of),
    ):
        yield
