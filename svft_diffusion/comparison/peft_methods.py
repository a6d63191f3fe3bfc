"""PEFT's methods in our loop: its own layers around the same layers of the models, made by its own tuners."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn

from svft_diffusion.adapters.targets import matching_layers
from svft_diffusion.comparison.methods import Method, Stored, canonical_parameters, stored_tensors
from svft_diffusion.errors import UserError
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.run import Run
from svft_diffusion.training.setup import AddTrainable

CONFIGS: dict[str, type[PeftConfig]] = {
    name: getattr(peft, f"{name}Config")
    for name in ("Lora", "AdaLora", "Vera", "BOFT", "OFT", "FourierFT", "LoHa", "LoKr", "IA3")
}
_NAME = "compared"  # of PEFT's adapters


@dataclass(frozen=True)
class PeftMethod(Method):
    """One of PEFT's adapters.

    Attributes:
        config: a key of `CONFIGS`.
        options: of that configuration; layers are added to them.
    """

    family = "peft"
    config: str
    options: Mapping[str, Any]

    def settings(self, learning_rate: float) -> dict[str, Any]:
        targets = self.options.get("targets")
        return {"learning_rate": learning_rate, **({} if targets is None else {"targets": targets})}

    @property
    def add_trainable(self) -> AddTrainable:
        return self._add

    def attach(self, run: Run) -> None:
        tuners = [model._compared_tuner for model in run.models.values() if hasattr(model, "_compared_tuner")]
        for tuner in tuners:
            _Allocation(tuner, run).attach()

    def count_values(self, models: Mapping[str, nn.Module], targets: str) -> int:
        bare = {component: copy.deepcopy(model).requires_grad_(False) for component, model in models.items()}
        config = TrainingConfig(targets=self.options.get("targets", targets), max_train_steps=100)
        # What AdaLoRA prunes is not stored.
        final = {"init_r": self.options["target_r"]} if self.config == "AdaLora" else {}
        method = PeftMethod(self.config, {**self.options, **final})
        return sum(parameter.numel() for parameter in method._add(config, bare).values())

    def stored(self, run: Run, folder: Path) -> Stored:
        tensors = {name: value.detach() for name, value in run.trained.items()}
        return stored_tensors(_without_pruned(tensors) if self.config == "AdaLora" else tensors, folder)

    def _add(self, config: TrainingConfig, models: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
        torch.manual_seed(config.seed)
        with _quiet():
            for component, model in models.items():
                try:
                    self._add_to_model(config, model)
                except (ValueError, TypeError, NotImplementedError, RuntimeError) as problem:
                    reason = " ".join(str(problem).split())
                    raise UserError(f"PEFT's {self.config} can't be put onto the {component}: {reason}") from problem
        parameters = canonical_parameters(models)
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
        return parameters

    def _add_to_model(self, config: TrainingConfig, model: nn.Module) -> None:
        layers = matching_layers(model, config.targets)
        options = {name: value for name, value in self.options.items() if name != "targets"}
        if self.config == "IA3":
            feed_forward = set(matching_layers(model, "feed-forward"))
            options["feedforward_modules"] = [layer for layer in layers if layer in feed_forward]
        if self.config == "AdaLora":
            # The authors prune within the middle of a run: a tenth of it first trains all, the last half the rest.
            steps = config.max_train_steps or 0
            options |= {"tinit": steps // 10, "tfinal": steps // 2, "total_step": steps}
        chosen = CONFIGS[self.config](target_modules=layers, **options)
        model.requires_grad_(False)
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[chosen.peft_type](model, chosen, _NAME)
        if isinstance(tuner, AdaLoraModel):
            # Not as a module: the tuner holds the model.
            model.__dict__["_compared_tuner"] = tuner


class _Allocation:
    """What AdaLoRA does around a step: its regularizer pulls the factors to be orthogonal, then ranks are given out.

    PEFT adds the regularizer to the loss of a language model; here its gradient comes after that of the loss was
    clipped.
    """

    def __init__(self, tuner: AdaLoraModel, run: Run) -> None:
        self._tuner, self._optimizer = tuner, run.optimizer
        self._step = 0
        settings: AdaLoraConfig = tuner.peft_config[_NAME]
        self._weight = settings.orth_reg_weight

    def attach(self) -> None:
        optimizer = getattr(self._optimizer, "optimizer", self._optimizer)  # within accelerate's
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        factors = [
            parameter if "lora_A" in name else parameter.T
            for name, parameter in self._tuner.model.named_parameters()
            if "lora_A" in name or "lora_B" in name
        ]
        with torch.enable_grad():
            distances = [
                torch.linalg.norm(rows @ rows.T - torch.eye(len(rows), device=rows.device)) for rows in factors
            ]
            (self._weight * torch.stack(distances).mean()).backward()

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._step += 1
        self._tuner.update_and_allocate(self._step)


def _without_pruned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AdaLoRA's triplets that were not pruned: those of a layer whose ``lora_E`` is not zero."""
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        rank = next((part for part in ("lora_A", "lora_B", "lora_E") if f".{part}." in name), None)
        if rank is None:
            kept[name] = tensor
            continue
        stays = tensors[name.replace(rank, "lora_E")].flatten() != 0
        kept[name] = tensor[:, stays] if rank == "lora_B" else tensor[stays]
    return kept


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT's notices on optional compiled kernels."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
