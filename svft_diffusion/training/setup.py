"""Everything between checked settings and the first step: models, adapter, optimizer, pictures, prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import nn

from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.adapters.freezing import AdaptiveVectorFreezing
from svft_diffusion.adapters.training import adapter_parameters
from svft_diffusion.adapters.tuner import layers_to_adapt
from svft_diffusion.data.cutting import Cutter
from svft_diffusion.data.dataset import Picture
from svft_diffusion.errors import UserError
from svft_diffusion.files import BaseDigests, digests_of_pipeline
from svft_diffusion.files.names import components_of
from svft_diffusion.files.tensor_names import layer_names
from svft_diffusion.models import ModelFamily, family_of, load_pipeline
from svft_diffusion.training.averaging import Averaging, make_averaging
from svft_diffusion.training.batches import Batch, Encoder, SampleNumbers, Stream, cached_batches, loaded_batches
from svft_diffusion.training.checkpoints import Stateful
from svft_diffusion.training.checks import Inputs
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.defaults import check_objective, check_size, resolve_defaults
from svft_diffusion.training.encoding_cache import EncodingCache, size_limit
from svft_diffusion.training.layers import adapter_of_models, check_layers
from svft_diffusion.training.metrics import available_tracker
from svft_diffusion.training.mixing import mixing_of
from svft_diffusion.training.new_tokens import add_new_tokens, clip_encoders, keep_norms
from svft_diffusion.training.optimizers import make_optimizer
from svft_diffusion.training.pictures import cutter_of, prior_pictures, prompts_of, streams_of
from svft_diffusion.training.prompts import PromptTable
from svft_diffusion.training.quantization import quantize_denoiser
from svft_diffusion.training.resting import RestingModels, resting_models
from svft_diffusion.training.sharding import move_all_but, shard_denoiser, shards
from svft_diffusion.training.speed import choose_speed
from svft_diffusion.training.status import DRAWING_CLASS_IMAGES, ENCODING_PICTURES
from svft_diffusion.training.subjects import Subject
from svft_diffusion.training.together import first_process_first
from svft_diffusion.training.unmix import Unmix, check_unmix, make_unmix

ADAPTER_NAME = "subject"
_DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


Progress = Callable[[str], None]
"""Called with the state of the run (see `status`) again and again; raises `Interrupted` to end it."""


BaseLoader = Callable[[TrainingConfig, torch.dtype], DiffusionPipeline]
"""Gives the base model of the settings in a precision, on any device, as `load_base` does."""


AddTrainable = Callable[[TrainingConfig, dict[str, nn.Module]], dict[str, nn.Parameter]]
"""Puts what trains into the frozen models (by component), and gives it in float32 by canonical name."""


def no_progress(state: str) -> None:
    """For runs that nobody looks at."""


@dataclass
class Run:
    """One training run, ready to step."""

    config: TrainingConfig  # with every default filled in
    accelerator: Accelerator
    family: ModelFamily
    models: dict[str, nn.Module]  # those that carry the adapter, by component
    parameters: dict[str, nn.Parameter]  # the trained values of the adapter's layers, by canonical name
    tokens: dict[str, nn.Parameter]  # rows of the new tokens, by canonical name; empty without
    optimizer: torch.optim.Optimizer
    freezing: AdaptiveVectorFreezing | None
    averaging: Averaging | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    prompts: PromptTable
    subjects: list[Subject]
    streams: list[Stream]
    cutter: Cutter
    encodings: EncodingCache | None
    unmix: Unmix | None
    total_steps: int
    steps_between_samples: int
    token_steps: int | None  # in which the new tokens train; None: all
    progress: Progress
    class_folders: ExitStack  # which no other run may change before it is closed
    finished_steps: int = 0

    @property
    def is_sharded(self) -> bool:
        """Whether the denoiser is spread over processes, which then must run it all together."""
        return shards(self.accelerator)

    def shard(self) -> None:
        """Spread the denoiser over processes if accelerate was launched so; nothing may change its weights later."""
        if self.is_sharded:
            assert self.base_digests  # of weights that no process has whole afterwards
            denoiser = next(iter(self.models.values()))
            shard_denoiser(denoiser, ADAPTER_NAME, self.accelerator.device, _DTYPES[self.accelerator.mixed_precision])

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

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Everything that trains, by canonical name."""
        return self.parameters | self.tokens

    @property
    def carriers(self) -> dict[str, nn.Module]:
        """The models that hold a part of the adapter, learned tokens included."""
        components = components_of(self.family.pipeline)
        return self.models | {name: components[name] for name in (key.partition(".")[0] for key in self.tokens)}

    def text_encoder_stopped(self, step: int) -> bool:
        """Whether the text encoders' part of the adapter trains no more in ``step``."""
        limit = self.config.stop_text_encoder_training
        return limit is not None and step > limit

    def tokens_stopped(self, step: int) -> bool:
        """Whether new tokens train no more in ``step``."""
        return self.token_steps is not None and step > self.token_steps

    def text_stopped(self, step: int) -> bool:
        """Whether something of the text encoders trained, and nothing of them does any more in ``step``."""
        encoders, tokens = self.text_encoder_stopped(step), self.tokens_stopped(step)
        return (encoders or tokens) and (encoders or not self.config.train_text_encoder) and (tokens or not self.tokens)

    def complete_token_gradients(self) -> None:
        """Zeros where no prompt of the step had a token: processes may differ in it, and optimizers pass over None."""
        for rows in self.tokens.values():
            if rows.grad is None:
                rows.grad = torch.zeros_like(rows)

    def drop_token_gradients(self) -> None:
        """Forget them, see `drop_text_encoder_gradients`."""
        for rows in self.tokens.values():
            rows.grad = None

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
        """The gradient's norm in each model and in the new tokens, where it is more than one of these, after clipping a
        gradient of the norm ``total``.
        """
        parts = {name: name.partition(".")[0] for name in self.parameters} | dict.fromkeys(self.tokens, "tokens")
        squares = dict.fromkeys((*self.models, *parts.values()), 0.0)
        if len(squares) == 1:
            return {}
        for name, parameter in self.trained.items():
            if parameter.grad is not None:
                squares[parts[name]] += float(parameter.grad.square().sum())
        clipped = math.sqrt(sum(squares.values()))
        return {component: math.sqrt(square) * total / (clipped or 1.0) for component, square in squares.items()}

    @property
    def trained_values(self) -> int:
        return sum(parameter.numel() for parameter in self.trained.values())

    @property
    def adapted_layers(self) -> int:
        return len(layer_names(self.parameters))

    @cached_property
    def base_digests(self) -> BaseDigests:
        """Of the adapted weights: frozen, so that once is enough for every file that the run writes."""
        return digests_of_pipeline(self.models, layer_names(self.parameters))

    @cached_property
    def resting(self) -> RestingModels:
        """The models that no step reads once the pictures are encoded."""
        return resting_models(
            self.family.pipeline.components,
            [*self.carriers, *self.prompts.read_in_steps],
            latents_cached=self.config.cache_latents,
            device=self.accelerator.device,
        )

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The batches of the optimizer steps after ``first_step``, ``gradient_accumulation_steps`` for each.

        Pictures that are cached are encoded now, and models that have no more to do then leave the accelerator.
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
            on_picture = partial(self.progress, ENCODING_PICTURES)
            batches = cached_batches(encoder, self.streams, self.cutter, numbers, on_picture)
        else:
            batches = loaded_batches(encoder, self.streams, self.cutter, numbers, config.dataloader_num_workers)
        if self.encodings is not None:
            self.encodings.evict()
        self.resting.rest()
        return batches


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
    pipeline = (load or load_base)(config, _DTYPES[accelerator.mixed_precision])
    family = family_of(pipeline, max_sequence_length=config.max_sequence_length, guidance_scale=config.guidance_scale)
    sharded, denoiser = shards(accelerator), next(iter(family.adapted_models(False)))
    if sharded:
        move_all_but(denoiser, pipeline, accelerator.device)
    else:
        pipeline.to(accelerator.device)
    number_of_photos = len(inputs.instance_pictures)
    check_objective(config, family)
    config = resolve_defaults(config, family, number_of_photos, accelerator)
    check_size(config, family)
    models = family.adapted_models(config.train_text_encoder)
    if config.train_text_encoder_ti:
        clip_encoders(family)
    check_layers(config, models)
    cutter = cutter_of(config, family.pixel_multiple)
    mixing = mixing_of(config, inputs.subjects)
    if mixing is not None:
        mixing.check_base(family, cutter.sizes)
    if config.unmixes:
        check_unmix(family)
    photos, of_class = inputs.instance_pictures, list[Picture]()
    class_folders = ExitStack()
    if config.with_prior_preservation:
        dtype = _DTYPES[accelerator.mixed_precision]
        if sharded and accelerator.is_main_process:
            pipeline.to(accelerator.device)  # whole once more, to draw
        try:
            of_class = first_process_first(
                accelerator, lambda: _prior_pictures(config, pipeline, inputs, dtype, progress, class_folders)
            )
        except BaseException:
            class_folders.close()
            raise
        if sharded:
            models[denoiser].to("cpu")
    if pipeline.vae.dtype != torch.float32:
        pipeline.vae.to(torch.float32)  # encoders of many base models overflow in 16 bit

    for component in components_of(pipeline).values():
        component.requires_grad_(False)
    pipeline.vae.requires_grad_(False)
    parameters = (add_trainable or add_adapter)(config, models)
    for trained in parameters.values():
        trained.data = trained.data.to(accelerator.device)  # of a denoiser that is yet to be spread
    tokens = add_new_tokens(config, family, inputs.subjects, ADAPTER_NAME)
    choose_speed(config, pipeline, models)
    optimizer = make_optimizer(config, parameters | tokens, accelerator.num_processes)
    if config.keep_token_norm:
        keep_norms(optimizer, tokens)  # before the averaging, which is of the values after it
    freezing = AdaptiveVectorFreezing(parameters, config.freezing) if config.freezing is not None else None
    if freezing is not None:
        freezing.attach(optimizer)
    averaging = make_averaging(config, parameters | tokens, optimizer)
    encodings = None
    if config.encoding_cache is not None:
        encodings = EncodingCache(config.encoding_cache, family, size_limit(config.encoding_cache_size))
    assert config.max_train_steps is not None
    return Run(
        config=config,
        accelerator=accelerator,
        family=family,
        models=models,
        parameters=parameters,
        tokens=tokens,
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
        prompts=PromptTable(
            family,
            prompts_of(config, photos, of_class, mixing),
            trained=models,
            cache=encodings,
        ),
        subjects=inputs.subjects,
        streams=streams_of(config, photos, of_class, cutter, mixing),
        cutter=cutter,
        encodings=encodings,
        unmix=make_unmix(family, mixing) if mixing is not None and config.unmixes else None,
        total_steps=config.max_train_steps,
        steps_between_samples=config.steps_between_samples(number_of_photos, accelerator.num_processes),
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
        models = family_of(pipeline).adapted_models(config.train_text_encoder)
        denoiser = next(iter(models.values()))
        adapted = layers_to_adapt(denoiser, adapter_of_models(config, models))
        quantize_denoiser(denoiser, config.base_quantization, PartialState().device, adapted)
    return pipeline


def _prior_pictures(
    config: TrainingConfig,
    pipeline: DiffusionPipeline,
    inputs: Inputs,
    dtype: torch.dtype,
    progress: Progress,
    users: ExitStack,
) -> list[Picture]:
    """`prior_pictures`, drawn in the precision of the settings by a second copy of the base if need be."""
    wanted = dtype if config.prior_generation_precision is None else _DTYPES[config.prior_generation_precision]
    if config.prior_source == "images" and wanted != dtype:
        pipeline = load_base(config, wanted).to(pipeline.device)
    return prior_pictures(
        config,
        pipeline,
        inputs.subjects,
        wanted,
        on_progress=lambda: progress(DRAWING_CLASS_IMAGES),
        users=users,
    )
