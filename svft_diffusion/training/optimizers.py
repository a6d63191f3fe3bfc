"""Optimizers from libraries: which settings suit each, what it needs installed, and how it is made."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from svft_diffusion.errors import UserError
from svft_diffusion.files.tensor_names import is_tokens, split_tensor_name
from svft_diffusion.training.config import TrainingConfig

# Optimizer -> (module that must be installed, extra of this package that brings it)
_PACKAGES = {
    "adamw8bit": ("bitsandbytes", "8bit"),
    "prodigy": ("prodigyopt", "optimizers"),
    "lion": ("lion_pytorch", "optimizers"),
    "schedulefree": ("schedulefree", "optimizers"),
}
_RATES = ("text_encoder_lr", "learning_rate_1d", "token_learning_rate")
_SMALLEST_8BIT = 4096  # bitsandbytes keeps the state of smaller vectors in 32 bits


def check_optimizer(config: TrainingConfig) -> list[str]:
    """What the user should hear about the optimizer's settings.

    Raises:
        UserError: a package is missing, or the optimizer can't work with the settings.
    """
    name = config.resolved_optimizer
    if config.use_8bit_adam and config.optimizer not in ("adamw", "adamw8bit"):
        raise UserError(f"--use_8bit_adam asks for 8-bit AdamW and --optimizer for {config.optimizer}; leave one out")
    if name in _PACKAGES and importlib.util.find_spec(_PACKAGES[name][0]) is None:
        module, extra = _PACKAGES[name]
        flag = "--use_8bit_adam" if config.use_8bit_adam else f"--optimizer {name}"
        raise UserError(f"{flag} needs the package {module}: pip install 'svft-diffusion[{extra}]'")
    if name == "prodigy":
        rate = config.learning_rate or 1.0
        for other in _RATES:
            if getattr(config, other) not in (None, rate):
                raise UserError(f"--optimizer prodigy finds one rate for everything; leave out --{other}")
        if rate != 1:
            return [f"prodigy finds the learning rate itself and is meant to run with 1, not {rate:g}"]
    if name == "schedulefree":
        if config.lr_scheduler != "constant":
            raise UserError(
                "--optimizer schedulefree takes the place of a schedule; leave out --lr_scheduler "
                "(--lr_warmup_steps is its own warm-up)"
            )
        if config.adam_beta1 == 0:
            raise UserError("--optimizer schedulefree averages with --adam_beta1, which must be above 0")
        if config.use_ema:
            raise UserError("--optimizer schedulefree averages the values itself; leave out --use_ema")
    return []


def make_optimizer(
    config: TrainingConfig, parameters: Mapping[str, nn.Parameter], number_of_processes: int
) -> torch.optim.Optimizer:
    """The optimizer that the settings name, with a parameter group for each learning rate.

    Args:
        config: with its learning rates filled in.
        parameters: what trains, by canonical name.
    """
    name = config.resolved_optimizer
    groups = _groups(config, parameters, number_of_processes)
    assert config.learning_rate is not None
    betas = (config.adam_beta1, config.resolved_adam_beta2)
    decay, epsilon = config.adam_weight_decay, config.adam_epsilon
    optimizer: Any
    if name == "adamw8bit":
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(groups, betas=betas, weight_decay=decay, eps=epsilon)
    elif name == "prodigy":
        import prodigyopt

        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line on weight decay
            optimizer = prodigyopt.Prodigy(
                groups,
                betas=betas,
                weight_decay=decay,
                eps=epsilon,
                decouple=True,
                use_bias_correction=True,
                safeguard_warmup=True,
            )
    elif name == "adafactor":
        from transformers.optimization import Adafactor

        # The given rate, without the paper's own schedule and scale; vectors have nothing to factor.
        optimizer = Adafactor(
            groups, lr=config.learning_rate, weight_decay=decay, scale_parameter=False, relative_step=False
        )
    elif name == "lion":
        import lion_pytorch

        optimizer = lion_pytorch.Lion(groups, lr=config.learning_rate, betas=betas, weight_decay=decay)
    elif name == "schedulefree":
        import schedulefree

        optimizer = schedulefree.AdamWScheduleFree(
            groups, betas=betas, weight_decay=decay, eps=epsilon, warmup_steps=config.lr_warmup_steps
        )
        optimizer.train()
    else:
        optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=decay, eps=epsilon)
    made: torch.optim.Optimizer = optimizer
    return made


def state_in_8_bits(parameters: Mapping[str, nn.Parameter]) -> tuple[int, int]:
    """Of how many values bitsandbytes keeps the state in 8 bits, and of how many there are."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    return sum(size for size in sizes if size >= _SMALLEST_8BIT), sum(sizes)


def scale_of_rates(config: TrainingConfig, number_of_processes: int) -> int | None:
    """What ``--scale_lr`` multiplies the learning rates by: the pictures of a step. None without it."""
    return config.pictures_per_step * number_of_processes if config.scale_lr else None


def _groups(
    config: TrainingConfig, parameters: Mapping[str, nn.Parameter], number_of_processes: int
) -> list[dict[str, Any]]:
    scale = scale_of_rates(config, number_of_processes) or 1
    by_rate: dict[str, list[nn.Parameter]] = {rate: [] for rate in ("learning_rate", *_RATES)}
    for name, parameter in parameters.items():
        if is_tokens(name):
            by_rate["token_learning_rate"].append(parameter)
            continue
        values_rate = "text_encoder_lr" if name.startswith("text_encoder") else "learning_rate"
        by_rate[values_rate if split_tensor_name(name)[1] == "values" else "learning_rate_1d"].append(parameter)
    # Decay would pull tokens to zero, which means nothing, while it pulls the rest to the base model.
    own = {"token_learning_rate": {"weight_decay": 0.0}}
    return [
        {"params": members, "lr": getattr(config, rate) * scale, **own.get(rate, {})}
        for rate, members in by_rate.items()
        if members
    ]
