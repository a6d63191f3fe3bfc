"""Everything between checked settings and the first step: models, adapter, optimizer, pictures, prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.optimization import get_scheduler
from torch import nn
from transformers import PreTrainedModel

from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.adapters.freezing import AdaptiveVectorFreezing
from svft_diffusion.adapters.targets import linear_layers
from svft_diffusion.adapters.training import adapter_parameters
from svft_diffusion.adapters.tuner import layer_options, preset_layers
from svft_diffusion.data.class_images import ClassImageRecipe, class_pictures
from svft_diffusion.data.dataset import Picture, ShuffledOrder, SquareCrop, distinct_prompts
from svft_diffusion.errors import UserError
from svft_diffusion.files import BaseDigests, digests_of_pipeline, fingerprint_of_pipeline
from svft_diffusion.files.names import canonical_name, components_of
from svft_diffusion.files.tensor_names import layer_names, split_tensor_name
from svft_diffusion.models import ModelFamily, base_display_name, default_resolution, family_of, load_pipeline
from svft_diffusion.training.batches import Batch, SampleNumbers, Stream, cached_batches, loaded_batches
from svft_diffusion.training.checks import Inputs, adapter_config
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.learning_rates import default_learning_rates
from svft_diffusion.training.metrics import available_tracker
from svft_diffusion.training.prompts import PromptTable

ADAPTER_NAME = "subject"
_DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    prompts: PromptTable
    streams: list[Stream]
    total_steps: int
    steps_between_samples: int

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
        assert config.resolution is not None
        crop = SquareCrop(config.resolution, config.center_crop, config.image_interpolation_mode, config.seed)
        numbers = SampleNumbers(
            config.train_batch_size,
            config.gradient_accumulation_steps,
            self.accelerator.num_processes,
            self.accelerator.process_index,
        ).batches(first_step, self.total_steps)
        if config.cache_latents:
            return cached_batches(self.family, self.streams, crop, numbers)
        return loaded_batches(self.family, self.streams, crop, numbers, config.dataloader_num_workers)


def prepare_run(config: TrainingConfig, inputs: Inputs, accelerator: Accelerator) -> Run:
    """Load the base model, draw class images, add the adapter and build what the loop needs.

    Raises:
        UserError: the base model doesn't fit the settings.
    """
    pipeline = load_base(config, _DTYPES[accelerator.mixed_precision])
    family = family_of(pipeline)
    pipeline.to(accelerator.device)
    number_of_photos = len(inputs.instance_pictures)
    config = resolve_defaults(config, pipeline, number_of_photos, accelerator)
    models = family.adapted_models(config.train_text_encoder)
    check_layers(config, models)
    pictures = {"instance": inputs.instance_pictures}
    if config.with_prior_preservation:
        with accelerator.main_process_first():
            pictures["class"] = draw_class_pictures(config, pipeline, inputs.class_prompts)
    if pipeline.vae.dtype != torch.float32:
        pipeline.vae.to(torch.float32)  # encoders of many base models overflow in 16 bit

    for component in components_of(pipeline).values():
        component.requires_grad_(False)
    pipeline.vae.requires_grad_(False)
    add_training_adapter(models, adapter_config(config), ADAPTER_NAME)
    _choose_memory_savings(config, pipeline, models)
    parameters = adapter_parameters(models, ADAPTER_NAME)
    optimizer = make_optimizer(config, parameters, accelerator.num_processes)
    freezing = AdaptiveVectorFreezing(parameters, config.freezing) if config.freezing is not None else None
    if freezing is not None:
        freezing.attach(optimizer)
    assert config.max_train_steps is not None
    return Run(
        config=config,
        accelerator=accelerator,
        family=family,
        models=models,
        parameters=parameters,
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
        prompts=PromptTable(family, distinct_prompts(*pictures.values()), encode_once=not config.train_text_encoder),
        streams=[Stream(kind, items, ShuffledOrder(len(items), config.seed, kind)) for kind, items in pictures.items()],
        total_steps=config.max_train_steps,
        steps_between_samples=config.steps_between_samples(number_of_photos, accelerator.num_processes),
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
    )


def resolve_defaults(
    config: TrainingConfig, pipeline: DiffusionPipeline, number_of_photos: int, accelerator: Accelerator
) -> TrainingConfig:
    """The settings with everything filled in that depends on the base model, the photos or the processes."""
    adapter = adapter_config(config)
    rates = default_learning_rates(config.method, config.pattern, config.pretrained_model_name_or_path)
    learning_rate = config.learning_rate or rates.values
    return dataclasses.replace(
        with_resolved_freezing(config),
        resolution=config.resolution or default_resolution(pipeline),
        off_diagonals=config.resolved_off_diagonals,
        fraction=adapter.fraction,
        select=adapter.select,
        train_bias=adapter.train_bias,
        max_train_steps=config.steps(number_of_photos, accelerator.num_processes),
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


def draw_class_pictures(config: TrainingConfig, pipeline: DiffusionPipeline, prompts: list[str]) -> list[Picture]:
    """The class pictures of the run; missing ones are drawn by ``pipeline``, which carries no adapter yet."""
    assert config.class_data_dir is not None and config.resolution is not None
    recipe = ClassImageRecipe(
        base_model=base_display_name(config.pretrained_model_name_or_path),
        fingerprint=base_fingerprint(pipeline),
        scheduler=type(pipeline.scheduler).__name__,
        prompts=prompts,
        seed=config.seed,
        resolution=config.resolution,
        num_inference_steps=config.prior_generation_num_inference_steps,
        guidance_scale=config.prior_generation_guidance_scale,
    )
    if config.prior_generation_precision is not None:
        pipeline = load_base(config, _DTYPES[config.prior_generation_precision]).to(pipeline.device)
    return class_pictures(
        pipeline,
        config.class_data_dir,
        recipe,
        count=config.num_class_images,
        batch_size=config.sample_batch_size,
        caption_source=config.caption_source,
    )


def base_fingerprint(pipeline: DiffusionPipeline) -> str:
    """Fingerprint of all linear layers that an adapter could change."""
    names = [
        canonical_name(component, model, path)
        for component, model in components_of(pipeline).items()
        for path in linear_layers(model)
    ]
    return fingerprint_of_pipeline(pipeline, names)


def make_optimizer(
    config: TrainingConfig, parameters: dict[str, nn.Parameter], number_of_processes: int = 1
) -> torch.optim.Optimizer:
    """AdamW with a group of parameters for each adapted model's values, and one for all that is one-dimensional."""
    scale = config.pictures_per_step * number_of_processes if config.scale_lr else 1
    by_rate: dict[str, list[nn.Parameter]] = {"learning_rate": [], "text_encoder_lr": [], "learning_rate_1d": []}
    for name, parameter in parameters.items():
        values_rate = "text_encoder_lr" if name.startswith("text_encoder") else "learning_rate"
        by_rate[values_rate if split_tensor_name(name)[1] == "values" else "learning_rate_1d"].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": members, "lr": getattr(config, rate) * scale} for rate, members in by_rate.items() if members
    ]
    if config.use_8bit_adam:
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    else:
        optimizer_class = torch.optim.AdamW
    optimizer: torch.optim.Optimizer = optimizer_class(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    return optimizer


def _choose_memory_savings(config: TrainingConfig, pipeline: DiffusionPipeline, models: dict[str, nn.Module]) -> None:
    if config.enable_xformers_memory_efficient_attention:
        try:
            pipeline.enable_xformers_memory_efficient_attention()
        except (ValueError, RuntimeError, NotImplementedError) as problem:
            raise UserError(f"--enable_xformers_memory_efficient_attention does not work here: {problem}") from problem
    if config.gradient_checkpointing:
        for model in models.values():
            if isinstance(model, ModelMixin):
                model.enable_gradient_checkpointing()
            elif isinstance(model, PreTrainedModel):
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()  # transformers checkpoints only what is in training mode
