"""What can train in our loop: our adapters, new tokens, or the whole model; PEFT's are in `peft_methods`."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel

from svft_diffusion.adapters import SpectralConfig, add_training_adapter
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.adapters.methods import LayerOptions, number_of_values
from svft_diffusion.adapters.targets import matching_layers
from svft_diffusion.adapters.tuner import layer_options, layers_to_adapt
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import base_module
from svft_diffusion.spectral import effective_rank
from svft_diffusion.training.checks import adapter_config
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.learning_rates import default_learning_rates
from svft_diffusion.training.persistence import save_result
from svft_diffusion.training.run import ADAPTER_NAME, Run
from svft_diffusion.training.setup import AddTrainable

BYTES_OF_A_VALUE = 4  # everything trains and is stored in float32


@dataclass(frozen=True)
class Stored:
    """What somebody would keep of a run."""

    values: int
    file_bytes: int  # with names and header


@dataclass(frozen=True)
class Method(ABC):
    """A way to train. The fields of a subclass are all that tells two of its methods apart."""

    family: ClassVar[str]
    trains: ClassVar[bool] = True

    @abstractmethod
    def settings(self, learning_rate: float) -> dict[str, Any]:
        """The settings of a run that are the method's own."""

    @property
    def add_trainable(self) -> AddTrainable | None:
        """What puts it into the models; None for our adapter."""
        return None

    def attach(self, run: Run) -> None:  # noqa: B027  # most have nothing to attach
        """What the method does beside the optimizer, once the run is prepared."""

    @abstractmethod
    def count_values(self, models: Mapping[str, nn.Module], targets: str) -> int:
        """Values that it would store on untouched models.

        Raises:
            UserError: it can't be put onto the layers; one line on why.
        """

    def count_bytes(self, models: Mapping[str, nn.Module], targets: str) -> int:
        """Bytes of what it would store on untouched models, without names and header. Raises as `count_values`."""
        return BYTES_OF_A_VALUE * self.count_values(models, targets)

    def stored(self, run: Run, folder: Path) -> Stored:
        """What is to be kept of a finished run, as a file in ``folder``."""
        return stored_tensors({name: value.detach() for name, value in run.trained.items()}, folder)

    def change_of_effective_rank(self, run: Run) -> float | None:
        """Mean over the adapted layers; None where it is not known."""
        return None

    def describe(self) -> dict[str, Any]:
        """All that the method is, as JSON holds it."""
        plain = {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, {})}
        return {"family": self.family, **plain}


@dataclass(frozen=True)
class SpectralMethod(Method):
    """One of our adapters.

    Attributes:
        options: settings of a run, such as ``method``, ``pattern``, ``off_diagonals``, ``targets``.
    """

    family = "spectral"
    options: Mapping[str, Any]

    def settings(self, learning_rate: float) -> dict[str, Any]:
        plain = TrainingConfig(**self.options)
        rates = default_learning_rates(plain.method, plain.pattern, plain.pretrained_model_name_or_path)
        if not plain.trains_one_dimensional:
            return {**self.options, "learning_rate": learning_rate}
        # What is one-dimensional keeps its distance from the rest, so that one search is for both.
        ratio = rates.one_dimensional / rates.values
        return {**self.options, "learning_rate": learning_rate, "learning_rate_1d": learning_rate * ratio}

    def count_values(self, models: Mapping[str, nn.Module], targets: str) -> int:
        wanted = adapter_config(TrainingConfig(**{"targets": targets, **self.options}))
        return sum(_values_of_model(model, wanted) for model in models.values())

    def count_bytes(self, models: Mapping[str, nn.Module], targets: str) -> int:
        lists_positions = self.options.get("pattern") in ("random", "top_k") or self.options.get("select") == "random"
        return super().count_bytes(models, targets) * (2 if lists_positions else 1)

    def stored(self, run: Run, folder: Path) -> Stored:
        file = folder / "adapter.safetensors"
        save_result(run, file)
        return Stored(run.trained_values, file.stat().st_size)

    def change_of_effective_rank(self, run: Run) -> float | None:
        changes = []
        for model in run.models.values():
            for layer in spectral_layers(model, ADAPTER_NAME).values():
                if layer.factors is None:
                    continue
                layer.wake()
                before = layer.factors.S
                weight = layer.get_base_layer().weight.detach().float()  # type: ignore[operator]
                after = weight + layer.get_delta_weight(ADAPTER_NAME).detach()
                changes.append(effective_rank(torch.linalg.svdvals(after.flatten(1))) - effective_rank(before.float()))
        return float(torch.stack(changes).mean()) if changes else None


@dataclass(frozen=True)
class NewTokens(Method):
    """Textual inversion: new words for the subject train, and nothing else."""

    family = "new tokens"
    tokens: int

    def settings(self, learning_rate: float) -> dict[str, Any]:
        return {
            "train_text_encoder": False,
            "train_text_encoder_ti": True,
            "num_new_tokens_per_abstraction": self.tokens,
            "token_learning_rate": learning_rate,
        }

    @property
    def add_trainable(self) -> AddTrainable:
        return _carrier_of_tokens

    def count_values(self, models: Mapping[str, nn.Module], targets: str) -> int:
        return self.tokens * _width_of_tokens(models)


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Every weight of the denoiser and the text encoder trains, as in DreamBooth's paper."""

    family = "full fine-tuning"

    def settings(self, learning_rate: float) -> dict[str, Any]:
        return {"learning_rate": learning_rate}

    @property
    def add_trainable(self) -> AddTrainable:
        return _everything

    def count_values(self, models: Mapping[str, nn.Module], targets: str) -> int:
        return sum(parameter.numel() for model in models.values() for parameter in model.parameters())


@dataclass(frozen=True)
class UntrainedBase(Method):
    """The base model as it is, to compare with."""

    family = "base"
    trains = False

    def settings(self, learning_rate: float) -> dict[str, Any]:
        return {}

    def count_values(self, models: Mapping[str, nn.Module], targets: str) -> int:
        return 0


def stored_tensors(tensors: Mapping[str, torch.Tensor], folder: Path) -> Stored:
    """Tensors as a safetensors file, each storage once."""
    file = folder / "trained.safetensors"
    own = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(own, file)
    return Stored(sum(tensor.numel() for tensor in own.values()), file.stat().st_size)


def canonical_parameters(models: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """What trains in the models, under names that the loop knows: all of it is of one learning rate."""
    return {
        f"{component}.{path}.values": parameter
        for component, model in models.items()
        for path, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _carrier_of_tokens(config: TrainingConfig, models: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Tokens are part of an adapter; this one has a single layer, which stays at zero: the base model."""
    component, denoiser = next(iter(models.items()))
    one_layer = SpectralConfig(target_modules=re.escape(matching_layers(denoiser, "attention")[0]))
    for zeros in add_training_adapter({component: denoiser}, one_layer, ADAPTER_NAME):
        zeros.requires_grad_(False)
    return {}


def _everything(config: TrainingConfig, models: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    for model in models.values():
        model.requires_grad_(True)
    return canonical_parameters(models)


def _width_of_tokens(models: Mapping[str, nn.Module]) -> int:
    for component, model in models.items():
        if component.startswith("text_encoder") and isinstance(model, PreTrainedModel):
            return int(model.get_input_embeddings().weight.shape[1])
    raise UserError("new tokens need a CLIP text encoder")


def _values_of_model(model: nn.Module, wanted: SpectralConfig) -> int:
    total = 0
    for path in layers_to_adapt(model, wanted):
        layer = model.get_submodule(path)
        options, _ = layer_options(layer, path, wanted)
        total += _values_of_layer(options, layer)
    return total


def _values_of_layer(options: LayerOptions, layer: nn.Module) -> int:
    sizes = {
        "values": lambda: number_of_values(options),
        "gate": lambda: 1,
        "bias": lambda: base_module(layer).bias.numel(),  # type: ignore[operator]
        "norm": lambda: base_module(layer).weight.numel(),  # type: ignore[operator]
    }
    return sum(sizes[part]() for part in options.parts)
