"""What can be known to be wrong before the base model is loaded."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svft_diffusion.adapters import SpectralConfig
from svft_diffusion.adapters.targets import DEFAULT_PRESET
from svft_diffusion.data.dataset import Picture
from svft_diffusion.errors import UserError
from svft_diffusion.factors.location import parse_size
from svft_diffusion.files.training_folder import ADAPTER_FILE, METRICS_FILE
from svft_diffusion.files.whole_files import check_writable
from svft_diffusion.models import resolve_base, resolve_vae
from svft_diffusion.sampling.picture_size import check_picture_size
from svft_diffusion.settings import settings_of
from svft_diffusion.training.card import CARD_FILE, CONFIG_FILE
from svft_diffusion.training.checkpoints import checkpoint_named, existing_checkpoints
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.hub import check_upload
from svft_diffusion.training.learning_rates import notes_on_numbers
from svft_diffusion.training.mixing import mixing_of
from svft_diffusion.training.mixing_settings import check_mixing_settings
from svft_diffusion.training.optimizers import check_optimizer
from svft_diffusion.training.quantization import check_quantization
from svft_diffusion.training.sharding import check_launch
from svft_diffusion.training.subjects import Subject, check_data_settings, read_subjects
from svft_diffusion.training.token_words import check_token_settings, with_new_tokens

_AT_LEAST_ONE = (
    "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_train_epochs", "resolution",
    "max_sequence_length", "checkpointing_steps", "checkpoints_total_limit", "num_class_images", "sample_batch_size",
    "prior_generation_num_inference_steps", "num_validation_images", "validation_steps", "validation_epochs",
    "lr_num_cycles", "freezing_warmup_steps", "freezing_interval", "freezing_top_k",
)  # fmt: skip
_ABOVE_ZERO = (
    "learning_rate", "text_encoder_lr", "learning_rate_1d", "adam_epsilon", "max_grad_norm",
    "huber_c", "snr_gamma", "stop_text_encoder_training",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "lr_warmup_steps", "lr_power", "prior_loss_weight", "prior_generation_guidance_scale", "adam_weight_decay",
    "guidance_scale", "noise_offset", "input_perturbation", "value_norm_penalty", "dataloader_num_workers", "seed",
    "freezing_number", "history_steps",
)  # fmt: skip
_BELOW_ONE = ("adam_beta1", "adam_beta2", "freezing_smoothing", "ema_decay", "caption_dropout")
_END_OF_POLYNOMIAL = 1e-7  # as diffusers has it
_SEED_LIMIT = 2**62  # picture i has seed + i, and torch takes 63 bits


@dataclass(frozen=True)
class Inputs:
    """The files that a run reads, looked at."""

    subjects: list[Subject]
    notes: list[str]  # what the user should hear about the folders
    checkpoint: Path | None

    @property
    def instance_pictures(self) -> list[Picture]:
        """The photos of all subjects."""
        return [picture for subject in self.subjects for picture in subject.pictures]


def check(config: TrainingConfig) -> Inputs:
    """Check everything about a run that needs no model, and change nothing on disk.

    Raises:
        UserError: one line with cause and remedy.
    """
    check_settings(config)
    check_launch(config)
    resolve_base(config.pretrained_model_name_or_path, config.base_config)
    if config.pretrained_vae_model_name_or_path is not None:
        resolve_vae(config.pretrained_vae_model_name_or_path)
    subjects, notes = read_subjects(config)
    subjects, on_tokens = with_new_tokens(config, subjects)
    mixing_of(config, subjects)
    notes += on_tokens
    notes += check_optimizer(config) + notes_on_numbers(config)
    checkpoint, damaged = _check_output(config, subjects)
    return Inputs(subjects, notes + damaged, checkpoint)


def check_settings(config: TrainingConfig) -> None:
    """Check values and combinations of the settings alone.

    Raises:
        UserError: one line with cause and remedy.
    """
    for item in settings_of(TrainingConfig):
        item.convert(getattr(config, item.name))
    _check_numbers(config)
    adapter_config(config)
    _check_freezing(config)
    _check_target_layers(config)
    if config.train_text_encoder and config.targets == "cross-attention":
        raise UserError("--targets cross-attention has no layer in the text encoder; leave out --train_text_encoder")
    for name in ("text_encoder_lr", "stop_text_encoder_training"):
        if getattr(config, name) is not None and not config.train_text_encoder:
            raise UserError(f"--{name} has no effect without --train_text_encoder")
    if config.learning_rate_1d is not None and not config.trains_one_dimensional:
        raise UserError("--learning_rate_1d has no effect where no bias, norm or gate trains; add --train_bias")
    if config.factor_cache_size is not None:
        parse_size(config.factor_cache_size, "--factor_cache_size")
    _check_schedule(config)
    check_data_settings(config)
    check_token_settings(config)
    check_mixing_settings(
        config,
        several_subjects=config.concepts_list is not None,
        torch_compile=config.torch_compile,
        caption_dropout=config.caption_dropout,
    )
    _check_packages(config)
    _check_objective(config)
    check_optimizer(config)
    check_upload(config)
    if config.push_to_hub and config.report_to == "wandb" and config.hub_token is not None:
        raise UserError("--hub_token would be sent to wandb with the settings; run `hf auth login` instead")


def adapter_config(config: TrainingConfig) -> SpectralConfig:
    """The adapter that the settings ask for. Raises `UserError` if it doesn't exist."""
    return SpectralConfig(
        method=config.method,
        pattern=config.pattern,
        off_diagonals=config.resolved_off_diagonals,
        rank=config.rank,
        fraction=config.fraction,
        select=config.select,
        init=config.init,
        seed=config.seed,
        train_values=config.train_values,
        train_bias=config.resolved_train_bias,
        train_norm=config.train_norm,
        compress_activations=config.compress_activations,
        targets=config.targets,
    )


def _check_schedule(config: TrainingConfig) -> None:
    warms_up = config.lr_scheduler != "constant" or config.resolved_optimizer == "schedulefree"
    if config.lr_warmup_steps and not warms_up:
        raise UserError("--lr_warmup_steps has no effect with --lr_scheduler constant; take constant_with_warmup")
    plain = TrainingConfig()
    for name, scheduler in (("lr_num_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
        if getattr(config, name) != getattr(plain, name) and config.lr_scheduler != scheduler:
            raise UserError(f"--{name} has no effect without --lr_scheduler {scheduler}")
    if config.lr_scheduler == "polynomial" and (config.learning_rate or 1.0) <= _END_OF_POLYNOMIAL:
        raise UserError(f"--lr_scheduler polynomial ends at {_END_OF_POLYNOMIAL:g}; --learning_rate must be above that")


def _check_objective(config: TrainingConfig) -> None:
    if config.huber_c > 1:
        raise UserError(f"--huber_c must be at most 1, got {config.huber_c:g}: it is where the threshold ends")
    plain = TrainingConfig()
    for name in ("huber_c", "huber_schedule"):
        if config.loss_type == "l2" and getattr(config, name) != getattr(plain, name):
            raise UserError(f"--{name} has no effect without --loss_type huber or smooth_l1")
    if config.ema_decay != plain.ema_decay and not config.use_ema:
        raise UserError("--ema_decay has no effect without --use_ema")


def _check_target_layers(config: TrainingConfig) -> None:
    if config.target_layers is None:
        return
    if not all(config.names_of_target_layers):
        raise UserError(f"--target_layers takes names with commas between them, got {config.target_layers!r}")
    if config.targets != DEFAULT_PRESET:
        raise UserError("--targets has no effect with --target_layers; leave out one of them")


def _check_freezing(config: TrainingConfig) -> None:
    if config.freezing is not None:
        return
    for name in ("freezing_warmup_steps", "freezing_interval", "freezing_top_k", "freezing_smoothing"):
        if getattr(config, name) is not None:
            raise UserError(f"--{name} has no effect without freezing; add --freezing_number, how often to freeze")


def _check_numbers(config: TrainingConfig) -> None:
    for name in (*_AT_LEAST_ONE, *_ABOVE_ZERO, *_AT_LEAST_ZERO):
        value = getattr(config, name)
        if value is None:
            continue
        if not math.isfinite(value):
            raise UserError(f"--{name} must be a finite number, got {value}")
        if name in _AT_LEAST_ONE and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
        if name in _ABOVE_ZERO and value <= 0:
            raise UserError(f"--{name} must be above 0, got {value}")
        if value < 0:
            raise UserError(f"--{name} must be 0 or more, got {value}")
    for name in _BELOW_ONE:
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"--{name} must be at least 0 and below 1, got {value}")
    if config.seed >= _SEED_LIMIT:
        raise UserError(f"--seed must be below {_SEED_LIMIT}, got {config.seed}")
    check_picture_size(resolution=config.resolution)


def _check_packages(config: TrainingConfig) -> None:
    check_quantization(config.base_quantization)
    if config.enable_xformers_memory_efficient_attention and importlib.util.find_spec("xformers") is None:
        raise UserError(
            "--enable_xformers_memory_efficient_attention needs the package xformers: "
            "pip install 'svft-diffusion[xformers]' (without the flag, torch's own fused attention runs)"
        )


def check_nothing_is_overwritten(config: TrainingConfig) -> None:
    """Refuse a new run over the result of an earlier one, or over files that no run wrote.

    Raises:
        UserError: ``output_dir`` holds such a file.
    """
    if config.resume_from_checkpoint is not None or existing_checkpoints(config.output_dir):
        return  # what `check` decides
    names = [ADAPTER_FILE, CARD_FILE]
    if not (config.output_dir / METRICS_FILE).exists():  # else it is that of a run that ended early
        names.append(CONFIG_FILE)
    for name in names:
        if (config.output_dir / name).exists():
            raise UserError(f"{config.output_dir / name} is there already; choose another --output_dir or move it away")


def _check_output(config: TrainingConfig, subjects: Sequence[Subject]) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, after making sure that the run may write where it wants to, and notes on others."""
    check_writable(config.output_dir)
    curves = None if config.report_to == "none" else config.output_dir / config.logging_dir
    for folder in {config.encoding_cache, curves, *(subject.class_data_dir for subject in subjects)}:
        if folder is not None:
            check_writable(folder)
    if config.resume_from_checkpoint is not None:
        return checkpoint_named(config.output_dir, config.resume_from_checkpoint)
    if existing_checkpoints(config.output_dir):
        raise UserError(
            f"{config.output_dir} holds checkpoints of an earlier run: go on with --resume_from_checkpoint latest, "
            "or choose another --output_dir"
        )
    return None, []
