"""Everything between checked settings and the first step: models, adapter, optimizer, pictures, prompts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import nn

from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.adapters.freezing import AdaptiveVectorFreezing
from svft_diffusion.adapters.training import adapter_parameters
from svft_diffusion.data.cutting import Cutter
from svft_diffusion.data.dataset import Picture
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import components_of
from svft_diffusion.models import ModelFamily, family_of
from svft_diffusion.training.averaging import make_averaging
from svft_diffusion.training.base import BaseLoader, load_base
from svft_diffusion.training.checks import Inputs
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.defaults import check_objective, check_size, resolve_defaults
from svft_diffusion.training.encoding_cache import EncodingCache, size_limit
from svft_diffusion.training.layers import adapter_of_models, check_layers
from svft_diffusion.training.metrics import available_tracker
from svft_diffusion.training.mixing import Mixing, mixing_of
from svft_diffusion.training.new_tokens import add_new_tokens, clip_encoders, keep_norms
from svft_diffusion.training.optimizers import make_optimizer
from svft_diffusion.training.pictures import cutter_of, prior_pictures, prompts_of, streams_of
from svft_diffusion.training.prompts import PromptTable
from svft_diffusion.training.run import ADAPTER_NAME, DTYPES, Progress, Run, no_progress
from svft_diffusion.training.sharding import move_all_but, shards
from svft_diffusion.training.speed import choose_speed
from svft_diffusion.training.status import DRAWING_CLASS_IMAGES
from svft_diffusion.training.together import first_process_first
from svft_diffusion.training.unmix import check_unmix, make_unmix

AddTrainable = Callable[[TrainingConfig, dict[str, nn.Module]], dict[str, nn.Parameter]]
"""Puts what trains into the frozen models (by component), and gives it in float32 by canonical name."""


def prepare_run(
    config: TrainingConfig,
    inputs: Inputs,
    accelerator: Accelerator,
    progress: Progress = no_progress,
    *,
    load: BaseLoader | None = None,
    add_trainable: AddTrainable | None = None,
) -> Run:
    """Load the base model, draw class images, add the adapter and build what the loop needs.

    Args:
        progress: told what goes on, see `Progress`.
        load: where the base model comes from (default: `load_base`).
        add_trainable: what trains in the place of our adapter (default: `add_adapter`). Only our adapter can be saved
            and resumed by `persistence`.

    Raises:
        UserError: the base model doesn't fit the settings.
    """
    class_folders = ExitStack()
    try:
        base = _fitting_base(config, inputs, accelerator, load or load_base)
        of_class = _class_pictures(base, inputs, accelerator, progress, class_folders)
        _freeze(base.pipeline)
        parameters, tokens = _trained_values(base, inputs, accelerator, add_trainable or add_adapter)
        return _assembled(base, inputs, accelerator, of_class, parameters, tokens, progress, class_folders)
    except BaseException:
        class_folders.close()
        raise


@dataclass(frozen=True)
class _FittingBase:
    """A loaded base model, and settings that fit it."""

    config: TrainingConfig  # with every default filled in
    pipeline: DiffusionPipeline
    family: ModelFamily
    models: dict[str, nn.Module]  # those that shall train, by component
    cutter: Cutter
    mixing: Mixing | None


def _fitting_base(config: TrainingConfig, inputs: Inputs, accelerator: Accelerator, load: BaseLoader) -> _FittingBase:
    """The base model on the device, with all checks that need it: better before class images are drawn than after."""
    pipeline = load(config, DTYPES[accelerator.mixed_precision])
    family = family_of(pipeline, max_sequence_length=config.max_sequence_length, guidance_scale=config.guidance_scale)
    if shards(accelerator):
        move_all_but(family.denoiser, pipeline, accelerator.device)
    else:
        pipeline.to(accelerator.device)
    check_objective(config, family)
    config = resolve_defaults(config, family, len(inputs.instance_pictures), accelerator)
    check_size(config, family)
    models = family.adapted_models(config.train_text_encoder)
    if config.train_text_encoder_ti:
        clip_encoders(family)
    check_layers(config, models)
    cutter = cutter_of(config, family.pixel_multiple)
    mixing = mixing_of(config, inputs.subjects)
    if mixing is not None:
        mixing.check_sizes(family, cutter.sizes)
        if not config.train_text_encoder_ti:
            mixing.check_prompts(family)
    if config.unmixes:
        check_unmix(family)
    return _FittingBase(config, pipeline, family, models, cutter, mixing)


def _class_pictures(
    base: _FittingBase, inputs: Inputs, accelerator: Accelerator, progress: Progress, users: ExitStack
) -> list[Picture]:
    """`prior_pictures`, drawn by the first process, in the precision of the settings."""
    config, pipeline = base.config, base.pipeline
    if not config.with_prior_preservation:
        return []
    dtype = DTYPES[accelerator.mixed_precision]
    wanted = dtype if config.prior_generation_precision is None else DTYPES[config.prior_generation_precision]

    def pictures() -> list[Picture]:
        draws_itself = config.prior_source != "images" or wanted == dtype
        return prior_pictures(
            config,
            pipeline if draws_itself else load_base(config, wanted).to(pipeline.device),
            inputs.subjects,
            wanted,
            on_progress=lambda: progress(DRAWING_CLASS_IMAGES),
            users=users,
        )

    sharded = shards(accelerator)
    if sharded and accelerator.is_main_process:
        pipeline.to(accelerator.device)  # whole once more, to draw
    of_class = first_process_first(accelerator, pictures)
    if sharded:
        base.models[base.family.denoiser].to("cpu")
    return of_class


def _freeze(pipeline: DiffusionPipeline) -> None:
    if pipeline.vae.dtype != torch.float32:
        pipeline.vae.to(torch.float32)  # encoders of many base models overflow in 16 bit
    for component in components_of(pipeline).values():
        component.requires_grad_(False)
    pipeline.vae.requires_grad_(False)


def _trained_values(
    base: _FittingBase, inputs: Inputs, accelerator: Accelerator, add_trainable: AddTrainable
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """What trains in the layers, and the rows of new tokens, by canonical name."""
    config = base.config
    parameters = add_trainable(config, base.models)
    for trained in parameters.values():
        trained.data = trained.data.to(accelerator.device)  # of a denoiser that is yet to be spread
    tokens = add_new_tokens(config, base.family, inputs.subjects, ADAPTER_NAME)
    if base.mixing is not None and tokens:
        base.mixing.check_prompts(base.family)
    choose_speed(config, base.pipeline, base.models)
    return parameters, tokens


def _assembled(
    base: _FittingBase,
    inputs: Inputs,
    accelerator: Accelerator,
    of_class: list[Picture],
    parameters: dict[str, nn.Parameter],
    tokens: dict[str, nn.Parameter],
    progress: Progress,
    class_folders: ExitStack,
) -> Run:
    config, family, mixing = base.config, base.family, base.mixing
    photos = inputs.instance_pictures
    optimizer = make_optimizer(config, parameters | tokens, accelerator.num_processes)
    if config.keep_token_norm:
        keep_norms(optimizer, tokens)  # before the averaging, which is of the values after it
    freezing = AdaptiveVectorFreezing(parameters, config.freezing) if config.freezing is not None else None
    if freezing is not None:
        freezing.attach(optimizer)
    encodings = None
    if config.encoding_cache is not None:
        encodings = EncodingCache(config.encoding_cache, family, size_limit(config.encoding_cache_size))
    assert config.max_train_steps is not None
    return Run(
        config=config,
        accelerator=accelerator,
        family=family,
        models=base.models,
        parameters=parameters,
        tokens=tokens,
        averaging=make_averaging(config, parameters | tokens, optimizer),
        optimizer=accelerator.prepare_optimizer(optimizer),
        freezing=freezing,
        lr_scheduler=get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        ),
        prompts=PromptTable(family, prompts_of(config, photos, of_class, mixing), trained=base.models, cache=encodings),
        subjects=inputs.subjects,
        streams=streams_of(config, photos, of_class, base.cutter, mixing),
        cutter=base.cutter,
        encodings=encodings,
        unmix=make_unmix(family, mixing) if mixing is not None and config.unmixes else None,
        total_steps=config.max_train_steps,
        steps_between_samples=config.steps_between_samples(len(photos), accelerator.num_processes),
        token_steps=config.token_steps(config.max_train_steps),
        progress=progress,
        class_folders=class_folders,
    )


def add_adapter(config: TrainingConfig, models: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Give the models the adapter of the settings; its values by canonical name.

    Raises:
        UserError: a model can't carry it.
    """
    add_training_adapter(models, adapter_of_models(config, models), ADAPTER_NAME)
    return adapter_parameters(models, ADAPTER_NAME)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Device, precision and trackers.

    Raises:
        UserError: this device doesn't compute in the wanted precision.
    """
    tracker, note = available_tracker(config.report_to)
    # Accelerate keeps its first precision for the life of the process; another run here may want another.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=tracker,
            # Others wait while the first draws class images, which takes longer than torch's patience.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
            project_config=ProjectConfiguration(
                project_dir=str(config.output_dir), logging_dir=str(config.output_dir / config.logging_dir)
            ),
        )
    except ValueError as problem:
        raise UserError(f"--mixed_precision {config.mixed_precision}: {problem}") from problem
    if note:
        accelerator.print(note)
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator
