"""The frozen base model of a run, as the settings name it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.state import PartialState
from diffusers import DiffusionPipeline
from torch import nn

from svft_diffusion.adapters.tuner import layers_to_adapt
from svft_diffusion.errors import UserError
from svft_diffusion.files.quantized import is_quantized, kept_full_weight
from svft_diffusion.models import family_of, load_pipeline
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.layers import adapter_of_models
from svft_diffusion.training.quantization import quantize_denoiser

BaseLoader = Callable[[TrainingConfig, torch.dtype], DiffusionPipeline]
"""Gives the base model of the settings in a precision, on any device, as `load_base` does."""


def load_base(config: TrainingConfig, dtype: torch.dtype) -> DiffusionPipeline:
    """The base model of the settings, on the CPU, but for layers that they quantize, on the device of the run.

    Raises:
        UserError: it can't be loaded, or not be quantized.
    """
    pipeline = load_pipeline(
        config.pretrained_model_name_or_path,
        dtype=dtype,
        revision=config.revision,
        variant=config.variant,
        local_files_only=config.local_files_only,
        base_config=config.base_config,
        vae=config.pretrained_vae_model_name_or_path,
    )
    if config.base_quantization != "none":
        denoiser, adapted = _denoiser_and_adapted(config, pipeline)
        quantize_denoiser(denoiser, config.base_quantization, PartialState().device, adapted)
    return pipeline


def is_base_for(config: TrainingConfig, pipeline: DiffusionPipeline) -> bool:
    """Whether a base that `load_base` gave for settings with other layers is one for these, too.

    Not so where they adapt a quantized layer whose full weight nobody has kept.
    """
    denoiser, adapted = _denoiser_and_adapted(config, pipeline)
    layers = [denoiser.get_submodule(path) for path in adapted]
    return all(kept_full_weight(layer) is not None for layer in layers if is_quantized(layer))


def _denoiser_and_adapted(config: TrainingConfig, pipeline: DiffusionPipeline) -> tuple[nn.Module, list[str]]:
    """The denoiser, without adapters, and the paths of its layers that the settings adapt."""
    models = family_of(pipeline).adapted_models(config.train_text_encoder)
    denoiser = next(iter(models.values()))
    try:
        return denoiser, layers_to_adapt(denoiser, adapter_of_models(config, models))
    except UserError:  # which is no fault of the base: `check_layers` raises it again
        return denoiser, []
