"""One training run, ready to step: what `setup` makes, and the loop works on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from accelerate import Accelerator
from torch import nn

from svft_diffusion.adapters.freezing import AdaptiveVectorFreezing
from svft_diffusion.data.cutting import Cutter
from svft_diffusion.files import BaseDigests, digests_of_pipeline
from svft_diffusion.files.names import components_of
from svft_diffusion.files.tensor_names import layer_names
from svft_diffusion.models import ModelFamily
from svft_diffusion.training.averaging import Averaging
from svft_diffusion.training.batches import Batch, Encoder, SampleNumbers, Stream, cached_batches, loaded_batches
from svft_diffusion.training.checkpoints import Stateful
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.encoding_cache import EncodingCache
from svft_diffusion.training.prompts import PromptTable
from svft_diffusion.training.resting import RestingModels, parkable_layers, resting_models
from svft_diffusion.training.sharding import shard_denoiser, shards
from svft_diffusion.training.status import ENCODING_PICTURES
from svft_diffusion.training.subjects import Subject
from svft_diffusion.training.unmix import Unmix

ADAPTER_NAME = "subject"

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Precisions of frozen models, as the settings and accelerate call them."""

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
            shard_denoiser(denoiser, ADAPTER_NAME, self.accelerator.device, DTYPES[self.accelerator.mixed_precision])

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
        """The models that no step reads once the pictures are encoded, and layers that may park their weights."""
        # Compiled graphs go past the layers, and what the base predicts needs all weights in every step.
        reads_weights = self.config.torch_compile or self.config.prior_source == "base"
        return resting_models(
            self.family.pipeline.components,
            [*self.carriers, *self.prompts.read_in_steps],
            latents_cached=self.config.cache_latents,
            device=self.accelerator.device,
            layers=[] if reads_weights else parkable_layers(self.models),
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
