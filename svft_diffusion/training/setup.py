"""Everything between checked settings and the first step: models, adapter, optimizer, pictures, prompts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import nn

from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.adapters.freezing import AdaptiveVectorFreezing
from svft_diffusion.adapters.training import adapter_parameters
from svft_diffusion.adapters.tuner import layer_options, preset_layers
from svft_diffusion.data.cutting import Cutter
from svft_diffusion.data.dataset import Picture, distinct_prompts
from svft_diffusion.errors import UserError
from svft_diffusion.files import BaseDigests, digests_of_pipeline
from svft_diffusion.files.names import components_of
from svft_diffusion.files.tensor_names import layer_names
from svft_diffusion.models import ModelFamily, default_resolution, family_of, load_pipeline
from svft_diffusion.training.averaging import Averaging, make_averaging
from svft_diffusion.training.batches import Batch, Encoder, SampleNumbers, Stream, cached_batches, loaded_batches
from svft_diffusion.training.checkpoints import Stateful
from svft_diffusion.training.checks import Inputs, adapter_config
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.encoding_cache import EncodingCache
from svft_diffusion.training.learning_rates import default_learning_rates
from svft_diffusion.training.metrics import available_tracker
from svft_diffusion.training.optimizers import make_optimizer
from svft_diffusion.training.pictures import cutter_of, prior_pictures, streams_of
from svft_diffusion.training.prompts import PromptTable
from svft_diffusion.training.speed import choose_speed
from svft_diffusion.training.status import DRAWING_CLASS_IMAGES, ENCODING_PICTURES
from svft_diffusion.training.subjects import Subject

ADAPTER_NAME = "subject"
_DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


Progress = Callable[[str], None]
"""Called with the state of the run (see `status`) again and again; raises `Interrupted` to end it."""


def no_progress(state: str) -> None:
    """For runs that nobody looks at."""


@dataclass
class Run:
    """One training run, ready to step."""

    config: TrainingConfig  # with every default filled in
    accelerator: Accelerator
    family: ModelFamily
    models: dict[str, nn.Module]  # those that carry the adapter, by component
    parameters: dict[str, nn.Parameter]  # the trained values, by canonical name
    optimizer: torch.optim.Optimizer
    freezing: AdaptiveVectorFreezing | None
    averaging: Averaging | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    prompts: PromptTable
    subjects: list[Subject]
    streams: list[Stream]
    cutter: Cutter
    encodings: EncodingCache | None
    total_steps: int
    steps_between_samples: int
    progress: Progress
    finished_steps: int = 0

    def draws_samples(self, step: int) -> bool:
        """Whether there are samples after ``step``, which is not the last."""
        return self.config.validation_prompt is not None and step % self.steps_between_samples == 0

    @property
    def pieces(self) -> dict[str, Stateful]:
        """Everything with a state that a resumed run goes on from, but for the trained values, in order of loading."""
        pieces: dict[str, Stateful | None] = {
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
            "freezing": self.freezing,
            "averaging": self.averaging,
            "gradient_scaler": self.accelerator.scaler,
        }
        return {name: piece for name, piece in pieces.items() if piece is not None}

    def averaged_values(self) -> AbstractContextManager[None]:
        """While entered, the models carry what samples and adapter files show; see `Averaging`."""
        return nullcontext() if self.averaging is None else self.averaging.in_place()

    def stop_text_encoder_training(self) -> None:
        """From here on the text encoders say what they say now."""
        with self.accelerator.autocast():
            self.prompts.stop_training()

    def drop_text_encoder_gradients(self) -> None:
        """Forget them: torch's optimizers pass over what has no gradient, weight decay included."""
        for name, parameter in self.parameters.items():
            if name.startswith("text_encoder"):
                parameter.grad = None

    def gradient_norms(self, total: float) -> dict[str, float]:
        """The gradient's norm in each model, where several train, after clipping a gradient of the norm ``total``."""
        if len(self.models) == 1:
            return {}
        squares = dict.fromkeys(self.models, 0.0)
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                squares[name.partition(".")[0]] += float(parameter.grad.square().sum())
        clipped = math.sqrt(sum(squares.values()))
        return {component: math.sqrt(square) * total / (clipped or 1.0) for component, square in squares.items()}

    @property
    def trained_values(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def adapted_layers(self) -> int:
        return len(layer_names(self.parameters))

    @cached_property
    def base_digests(self) -> BaseDigests:
        """Of the adapted weights: frozen, so that once is enough for every file that the run writes."""
        return digests_of_pipeline(self.models, layer_names(self.parameters))

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The batches of the optimizer steps after ``first_step``, ``gradient_accumulation_steps`` for each.

        Pictures that are cached are encoded now.
        """
        config = self.config
        numbers = SampleNumbers(
            config.train_batch_size,
            config.gradient_accumulation_steps,
            self.accelerator.num_processes,
            self.accelerator.process_index,
        ).batches(first_step, self.total_steps)
        encoder = Encoder(self.family, config.unmasked_weight if config.masked_loss else None, self.encodings)
        if config.cache_latents:
            return cached_batches(encoder, self.streams, self.cutter, numbers, lambda: self.progress(ENCODING_PICTURES))
        return loaded_batches(encoder, self.streams, self.cutter, numbers, config.dataloader_num_workers)


def prepare_run(
    config: TrainingConfig, inputs: Inputs, accelerator: Accelerator, progress: Progress = no_progress
) -> Run:
    """Load the base model, draw class images, add the adapter and build what the loop needs.

    Args:
        progress: told what goes on, see `Progress`.

    Raises:
        UserError: the base model doesn't fit the settings.
    """
    pipeline = load_base(config, _DTYPES[accelerator.mixed_precision])
    family = family_of(pipeline, max_sequence_length=config.max_sequence_length, guidance_scale=config.guidance_scale)
    pipeline.to(accelerator.device)
    number_of_photos = len(inputs.instance_pictures)
    check_objective(config, family)
    config = resolve_defaults(config, family, number_of_photos, accelerator)
    check_size(config, family)
    models = family.adapted_models(config.train_text_encoder)
    check_layers(config, models)
    cutter = cutter_of(config, family.pixel_multiple)
    photos, of_class = inputs.instance_pictures, list[Picture]()
    if config.with_prior_preservation:
        with accelerator.main_process_first():
            of_class = _prior_pictures(config, pipeline, inputs, _DTYPES[accelerator.mixed_precision], progress)
    if pipeline.vae.dtype != torch.float32:
        pipeline.vae.to(torch.float32)  # encoders of many base models overflow in 16 bit

    for component in components_of(pipeline).values():
        component.requires_grad_(False)
    pipeline.vae.requires_grad_(False)
    add_training_adapter(models, adapter_config(config), ADAPTER_NAME)
    choose_speed(config, pipeline, models)
    parameters = adapter_parameters(models, ADAPTER_NAME)
    optimizer = make_optimizer(config, parameters, accelerator.num_processes)
    freezing = AdaptiveVectorFreezing(parameters, config.freezing) if config.freezing is not None else None
    if freezing is not None:
        freezing.attach(optimizer)
    averaging = make_averaging(config, parameters, optimizer)
    encodings = None if config.encoding_cache is None else EncodingCache(config.encoding_cache, family)
    assert config.max_train_steps is not None
    return Run(
        config=config,
        accelerator=accelerator,
        family=family,
        models=models,
        parameters=parameters,
        optimizer=accelerator.prepare_optimizer(optimizer),
        freezing=freezing,
        averaging=averaging,
        lr_scheduler=get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        ),
        prompts=PromptTable(family, distinct_prompts(photos, of_class), trained=models, cache=encodings),
        subjects=inputs.subjects,
        streams=streams_of(config, photos, of_class, cutter),
        cutter=cutter,
        encodings=encodings,
        total_steps=config.max_train_steps,
        steps_between_samples=config.steps_between_samples(number_of_photos, accelerator.num_processes),
        progress=progress,
    )


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


def load_base(config: TrainingConfig, dtype: torch.dtype) -> DiffusionPipeline:
    """The base model of the settings, on the CPU. Raises `UserError` if it can't be loaded."""
    return load_pipeline(
        config.pretrained_model_name_or_path,
        dtype=dtype,
        revision=config.revision,
        variant=config.variant,
        local_files_only=config.local_files_only,
        base_config=config.base_config,
    )


def resolve_defaults(
    config: TrainingConfig, family: ModelFamily, number_of_photos: int, accelerator: Accelerator
) -> TrainingConfig:
    """The settings with everything filled in that depends on the base model, the photos or the processes."""
    adapter = adapter_config(config)
    rates = default_learning_rates(
        config.method, config.pattern, config.pretrained_model_name_or_path, config.resolved_optimizer
    )
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
        stop_text_encoder_training=config.text_encoder_steps(steps),
        optimizer=config.resolved_optimizer,
        adam_beta2=config.resolved_adam_beta2,
        learning_rate=learning_rate,
        text_encoder_lr=(config.text_encoder_lr or learning_rate) if config.train_text_encoder else None,
        learning_rate_1d=(config.learning_rate_1d or rates.one_dimensional) if config.trains_one_dimensional else None,
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


def check_layers(config: TrainingConfig, models: dict[str, nn.Module]) -> None:
    """Raise `UserError` if a layer can't carry the adapter: better before class images are drawn than after."""
    wanted = adapter_config(config)
    vectors = 0
    for model in models.values():
        for path in preset_layers(model, wanted):
            options, _ = layer_options(model.get_submodule(path), path, wanted)
            vectors += len(options.parts)
    if config.freezing is not None:
        config.freezing.number_frozen(vectors)


def _prior_pictures(
    config: TrainingConfig, pipeline: DiffusionPipeline, inputs: Inputs, dtype: torch.dtype, progress: Progress
) -> list[Picture]:
    """`prior_pictures`, drawn in the precision of the settings by a second copy of the base if need be."""
    wanted = dtype if config.prior_generation_precision is None else _DTYPES[config.prior_generation_precision]
    if config.prior_source == "images" and wanted != dtype:
        pipeline = load_base(config, wanted).to(pipeline.device)
    return prior_pictures(config, pipeline, inputs.subjects, wanted, on_progress=lambda: progress(DRAWING_CLASS_IMAGES))
