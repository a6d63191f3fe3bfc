"""What settings leave open, and what depends on the base model: filled in once it is loaded, and checked."""

from __future__ import annotations

import dataclasses

from accelerate import Accelerator

from svft_diffusion.errors import UserError
from svft_diffusion.models import ModelFamily, default_resolution
from svft_diffusion.training.checks import adapter_config
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.learning_rates import default_learning_rates, default_token_rate


def resolve_defaults(
    config: TrainingConfig, family: ModelFamily, number_of_photos: int, accelerator: Accelerator
) -> TrainingConfig:
    """The settings with everything filled in that depends on the base model, the photos or the processes."""
    adapter = adapter_config(config)
    rates = default_learning_rates(
        config.method, config.pattern, config.pretrained_model_name_or_path, config.resolved_optimizer
    )
    token_rate = default_token_rate(config.pretrained_model_name_or_path, config.resolved_optimizer)
    learning_rate = config.learning_rate or rates.values
    steps = config.steps(number_of_photos, accelerator.num_processes)
    return dataclasses.replace(
        with_resolved_freezing(config),
        resolution=config.resolution or default_resolution(family.pipeline),
        timestep_sampling=config.timestep_sampling or family.timestep_sampling,
        max_sequence_length=family.max_sequence_length,
        guidance_scale=family.guidance_scale,
        off_diagonals=config.resolved_off_diagonals,
        fraction=adapter.fraction,
        select=adapter.select,
        train_bias=adapter.train_bias,
        max_train_steps=steps,
        checkpointing_steps=config.steps_between_checkpoints(steps),
        stop_text_encoder_training=config.text_encoder_steps(steps),
        optimizer=config.resolved_optimizer,
        adam_beta2=config.resolved_adam_beta2,
        learning_rate=learning_rate,
        text_encoder_lr=(config.text_encoder_lr or learning_rate) if config.train_text_encoder else None,
        learning_rate_1d=(config.learning_rate_1d or rates.one_dimensional) if config.trains_one_dimensional else None,
        token_learning_rate=(config.token_learning_rate or token_rate) if config.train_text_encoder_ti else None,
        mixed_precision=accelerator.mixed_precision,
    )


def with_resolved_freezing(config: TrainingConfig) -> TrainingConfig:
    """The settings with the numbers of adaptive vector freezing filled in."""
    freezing = config.freezing
    if freezing is None:
        return dataclasses.replace(config, freezing_number=0)
    return dataclasses.replace(
        config,
        freezing_number=freezing.number_of_freezings,
        freezing_warmup_steps=freezing.warmup_steps,
        freezing_interval=freezing.interval,
        freezing_smoothing=freezing.smoothing,
    )


def check_size(config: TrainingConfig, family: ModelFamily) -> None:
    """Raise `UserError` if the base model can't draw pictures of the size of the settings."""
    assert config.resolution is not None
    if config.resolution % family.pixel_multiple:
        raise UserError(
            f"--resolution must be a multiple of {family.pixel_multiple} with this base, got {config.resolution}"
        )


def check_objective(config: TrainingConfig, family: ModelFamily) -> None:
    """Raise `UserError` if the base model's training target has no use for a setting of the objective."""
    if config.snr_gamma is not None and family.prediction_type == "flow":
        raise UserError(
            "--snr_gamma is for base models that predict noise or velocity; this one is trained by flow matching, "
            "which has weights of its own: leave it out"
        )
