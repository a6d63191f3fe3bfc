"""Settings of a training run: one dataclass behind the command line, YAML files and the app."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svft_diffusion.adapters.freezing import FreezingSettings
from svft_diffusion.adapters.methods import DEFAULT_FRACTION, INITS, METHODS, SELECTIONS
from svft_diffusion.adapters.targets import DEFAULT_PRESET, PRESETS
from svft_diffusion.files.header import VALUE_DTYPES
from svft_diffusion.models import EMBEDDED_MODEL
from svft_diffusion.settings import setting
from svft_diffusion.training.losses import HUBER_SCHEDULES, LOSS_TYPES, LossSettings
from svft_diffusion.training.mixing_settings import MixingSettings
from svft_diffusion.training.picture_settings import PictureSettings
from svft_diffusion.training.token_settings import TokenSettings

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
BASE_QUANTIZATIONS = ("none", "bnb-4bit", "bnb-8bit", "int8")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor", "lion", "schedulefree")
DEFAULT_TRAIN_STEPS = 400
MOST_STEPS_AT_RISK = 500  # from one checkpoint to the next, unless more are asked for
DEFAULT_OFF_DIAGONALS = 2
FREEZING = FreezingSettings()  # its defaults
_PATTERNS = tuple(dict.fromkeys(pattern for method in METHODS.values() for pattern in method.patterns))

_BASE = "base model"
_ADAPTER = "adapter"
_FREEZING = "adaptive vector freezing"
_TRAINING = "training"
_OBJECTIVE = "objective"
_OPTIMIZER = "optimizer"
_OUTPUT = "output and checkpoints"
_LOOKING = "looking while it trains"
_SPEED = "speed and memory"


@dataclass(frozen=True)
class TrainingConfig(MixingSettings, TokenSettings, PictureSettings):
    """What to train on which pictures. Names and meanings follow the DreamBooth LoRA example of diffusers.

    `svft_diffusion.training.checks.check_settings` says whether the settings fit together.
    """

    pretrained_model_name_or_path: str = setting(
        EMBEDDED_MODEL, "base model: toybox (embedded), a diffusers folder, .safetensors file, or Hub name", group=_BASE
    )
    base_config: Path | None = setting(
        None, "for a file: a pipeline folder with its settings and tokenizers (default: from the Hub)", group=_BASE
    )
    revision: str | None = setting(None, "branch, tag or commit of a Hub model", group=_BASE)
    variant: str | None = setting(None, "file variant of the base model, such as fp16", group=_BASE)
    pretrained_vae_model_name_or_path: str | None = setting(
        None, "another VAE for the pictures: its folder, or its name on the Hub (default: the base's)", group=_BASE
    )
    local_files_only: bool = setting(False, "never ask the Hub; use what was downloaded before", group=_BASE)

    method: str = setting(
        "svft",
        "svft: core matrix M; svdiff: shifted singular values; vectorfit: singular values and biases; siva: the "
        "smallest singular values",
        group=_ADAPTER,
        choices=tuple(METHODS),
    )
    pattern: str = setting(
        "plain",
        "entries of M: plain (the diagonal) or, with svft, banded, random, or top_k (best aligned singular vectors)",
        group=_ADAPTER,
        choices=_PATTERNS,
    )
    off_diagonals: int | None = setting(
        None,
        "off-diagonals on each side with banded; random and top_k take as many entries as banded would "
        f"(default for these three: {DEFAULT_OFF_DIAGONALS})",
        group=_ADAPTER,
    )
    rank: int | None = setting(
        None, "leading singular triplets that train; the rest stays as it is (default: all)", group=_ADAPTER
    )
    fraction: float | None = setting(
        None, f"part of the singular values that siva trains (default there: {DEFAULT_FRACTION})", group=_ADAPTER
    )
    select: str | None = setting(
        None, "which singular values siva trains (default there: bottom)", group=_ADAPTER, choices=SELECTIONS
    )
    init: str = setting(
        "zero",
        "start of the values: zero (the base model); random (small numbers); official (as the SVFT authors' code, with "
        "a gate; svft only)",
        group=_ADAPTER,
        choices=INITS,
    )
    train_values: bool = setting(True, "train singular values; without, only biases and norms", group=_ADAPTER)
    train_bias: bool | None = setting(
        None, "train the biases of adapted layers (default: with vectorfit, where they are part of it)", group=_ADAPTER
    )
    train_norm: bool | None = setting(
        None, "train the weights of norm layers (default: with --targets all)", group=_ADAPTER
    )
    targets: str = setting(DEFAULT_PRESET, "layers that train", group=_ADAPTER, choices=tuple(PRESETS))
    target_layers: str | None = setting(
        None,
        "names of layers instead, with commas: whole paths, their ends, or blocks: 'attn2.to_k,down_blocks.1'",
        group=_ADAPTER,
    )
    train_text_encoder: bool = setting(False, "adapt the CLIP text encoders too (never T5)", group=_ADAPTER)

    freezing_number: int | None = setting(
        None,
        "adaptive vector freezing: how often the vectors that trained most are frozen for a while, so that the others "
        f"catch up; 0 switches it off (default: {FREEZING.number_of_freezings} with vectorfit, which it is part of; 0 "
        "with the other methods, whose papers have no such thing)",
        group=_FREEZING,
    )
    freezing_warmup_steps: int | None = setting(
        None,
        f"steps before the first freezing, in which strengths form (default: {FREEZING.warmup_steps}, so that with the "
        f"other defaults freezing ends at step {FREEZING.last_step} of {DEFAULT_TRAIN_STEPS} and all train together at "
        "last)",
        group=_FREEZING,
    )
    freezing_interval: int | None = setting(
        None, f"steps until the next freezing chooses anew (default: {FREEZING.interval})", group=_FREEZING
    )
    freezing_top_k: int | None = setting(
        None, "vectors frozen at a time (default: a fifth of them, few enough that most train)", group=_FREEZING
    )
    freezing_smoothing: float | None = setting(
        None,
        f"beta of the moving average of strengths (default: {FREEZING.smoothing}, about the last hundred steps)",
        group=_FREEZING,
    )

    train_batch_size: int = setting(
        4, "photos in a batch, for each process; class pictures come on top", group=_TRAINING
    )
    max_train_steps: int | None = setting(
        None, f"optimizer steps (default: {DEFAULT_TRAIN_STEPS}); wins over --num_train_epochs", group=_TRAINING
    )
    num_train_epochs: int | None = setting(
        None, "passes over the photos, instead of a number of steps", group=_TRAINING
    )
    gradient_accumulation_steps: int = setting(1, "batches whose gradients make one step", group=_TRAINING)
    timestep_sampling: str | None = setting(
        None,
        "uniform: all noise levels alike, as in DreamBooth; focused: a quarter uniform, the rest from "
        "sigmoid(0.6 + 0.8 N(0,1)), the upper middle where the subject's shape and colours are decided; logit_normal: "
        "sigmoid(N(0,1)), the middle (default: uniform; logit_normal with SD 3 and Flux)",
        group=_TRAINING,
        choices=("uniform", "focused", "logit_normal"),
    )
    max_sequence_length: int | None = setting(
        None, "tokens that T5 reads (default: as when the base draws: 256 with SD 3, 512 with Flux)", group=_TRAINING
    )
    guidance_scale: float | None = setting(
        None, "what a guidance-distilled Flux is told while it trains (default: 3.5)", group=_TRAINING
    )
    seed: int = setting(0, "seed of everything random; equal settings give an equal file", group=_TRAINING)

    loss_type: str = setting(
        "l2", "what an error counts; huber and smooth_l1: less if large", group=_OBJECTIVE, choices=LOSS_TYPES
    )
    huber_c: float = setting(0.1, "error from which it is large, at the most noise", group=_OBJECTIVE)
    huber_schedule: str = setting("snr", "course from 1 to that", group=_OBJECTIVE, choices=HUBER_SCHEDULES)
    snr_gamma: float | None = setting(None, "min-SNR weights of noise levels; the paper's are of 5", group=_OBJECTIVE)
    noise_offset: float = setting(0.0, "noise that is constant over a channel; often 0.05 to 0.1", group=_OBJECTIVE)
    input_perturbation: float = setting(0.0, "second noise, in the input alone; the paper's is 0.1", group=_OBJECTIVE)
    value_norm_penalty: float = setting(0.0, "weight of the values' squared norm in the loss", group=_OBJECTIVE)
    use_ema: bool = setting(False, "samples and files hold the values' average over steps", group=_OBJECTIVE)
    ema_decay: float = setting(0.999, "its largest decay, (1 + n) / (10 + n) in step n", group=_OBJECTIVE)

    optimizer: str = setting("adamw", "what takes the steps; some need a package", group=_OPTIMIZER, choices=OPTIMIZERS)
    learning_rate: float | None = setting(
        None, "initial learning rate (default: from the table for method, pattern and base)", group=_OPTIMIZER
    )
    text_encoder_lr: float | None = setting(
        None, "learning rate in the text encoder (default: as --learning_rate)", group=_OPTIMIZER
    )
    stop_text_encoder_training: float | None = setting(
        None, "steps in which the text encoder trains; below 1, their share of all (default: all)", group=_OPTIMIZER
    )
    learning_rate_1d: float | None = setting(
        None,
        "learning rate of what is one-dimensional in the model: biases, norm weights, gates (default: from the table)",
        group=_OPTIMIZER,
    )
    scale_lr: bool = setting(
        False, "multiply the learning rate by processes, accumulation and batch size", group=_OPTIMIZER
    )
    lr_scheduler: str = setting("constant", "course of the learning rate", group=_OPTIMIZER, choices=LR_SCHEDULERS)
    lr_warmup_steps: int = setting(0, "steps of warm-up", group=_OPTIMIZER)
    lr_num_cycles: int = setting(1, "hard resets of cosine_with_restarts", group=_OPTIMIZER)
    lr_power: float = setting(1.0, "power of polynomial", group=_OPTIMIZER)
    use_8bit_adam: bool = setting(False, "short for --optimizer adamw8bit", group=_OPTIMIZER)
    adam_beta1: float = setting(0.9, "Adam's beta1", group=_OPTIMIZER)
    adam_beta2: float | None = setting(None, "Adam's beta2 (default: 0.999; with lion 0.99)", group=_OPTIMIZER)
    adam_weight_decay: float = setting(1e-2, "weight decay; it pulls towards the base model", group=_OPTIMIZER)
    adam_epsilon: float = setting(1e-8, "Adam's epsilon", group=_OPTIMIZER)
    max_grad_norm: float = setting(1.0, "largest gradient norm", group=_OPTIMIZER)

    output_dir: Path = setting(Path("outputs/adapter"), "where everything is written", group=_OUTPUT)
    adapter_dtype: str = setting(
        "float32",
        "how adapter.safetensors stores what was trained; float16 halves it (checkpoints are always float32)",
        group=_OUTPUT,
        choices=VALUE_DTYPES,
    )
    thumbnail: bool = setting(
        True,
        "with --validation_prompt: put the first sample of the end, small, into the adapter file, where other tools "
        "look for a picture",
        group=_OUTPUT,
    )
    checkpointing_steps: int | None = setting(
        None,
        f"a checkpoint every so many steps (default: a tenth of the run, {MOST_STEPS_AT_RISK} at most)",
        group=_OUTPUT,
    )
    checkpoints_total_limit: int | None = setting(None, "keep the newest so many checkpoints", group=_OUTPUT)
    history_steps: int | None = setting(
        None,
        "keep the adapter of every so many steps in history/; 0: none (default: a tenth of the run)",
        group=_OUTPUT,
    )
    check_result: bool | None = setting(
        None,
        "load the file into a fresh base model at the end and compare one picture (default: with --validation_prompt)",
        group=_OUTPUT,
    )
    resume_from_checkpoint: str | None = setting(
        None, "go on from a checkpoint of --output_dir: 'latest' or its name, such as checkpoint-500", group=_OUTPUT
    )
    push_to_hub: bool = setting(
        False, "upload adapter, card, samples and metrics to the Hugging Face Hub at the end", group=_OUTPUT
    )
    hub_model_id: str | None = setting(
        None, "repository to upload to (default: the output folder's name)", group=_OUTPUT
    )
    hub_private_repo: bool = setting(
        True, "a repository that is not there yet becomes a private one, which you can publish later", group=_OUTPUT
    )
    hub_token: str | None = setting(None, "token for the upload (default: that of `hf auth login`)", group=_OUTPUT)

    dry_run: bool = setting(
        False, "take two steps, tell what the run would need, and write nothing into --output_dir", group=_LOOKING
    )
    validation_prompt: str | None = setting(None, "draw samples with this prompt while it trains", group=_LOOKING)
    num_validation_images: int = setting(4, "samples each time; sample i has seed + i", group=_LOOKING)
    validation_steps: int = setting(100, "draw samples every so many steps, at step 0 and at the end", group=_LOOKING)
    validation_epochs: int | None = setting(
        None, "draw samples every so many passes over the photos, instead of --validation_steps", group=_LOOKING
    )
    report_to: str = setting(
        "tensorboard", "where curves go besides metrics.jsonl", group=_LOOKING, choices=("tensorboard", "wandb", "none")
    )
    logging_dir: Path = setting(Path("logs"), "folder of the curves inside --output_dir", group=_LOOKING)

    cache_latents: bool = setting(
        True,
        "encode every picture once before training; of a photo that is cut at random, a few cuts are kept and taken "
        "in turn. Without it, every pass cuts anew",
        group=_SPEED,
    )
    encoding_cache: Path | None = setting(
        None, "folder that keeps encoded pictures and prompts for later runs (default: memory alone)", group=_SPEED
    )
    encoding_cache_size: str | None = setting(
        None, "how much that folder may hold, as --factor_cache_size (default: 20 GiB)", group=_SPEED
    )
    base_quantization: str = setting(
        "none",
        "few bits for the denoiser's linear layers, which saves memory: bnb-4bit (NF4) and bnb-8bit of bitsandbytes, "
        "int8 of torchao; the adapter is that of the full base",
        group=_SPEED,
        choices=BASE_QUANTIZATIONS,
    )
    mixed_precision: str | None = setting(
        None,
        "precision of the frozen model (default: as accelerate is set up); what trains is always float32",
        group=_SPEED,
        choices=("no", "fp16", "bf16"),
    )
    gradient_checkpointing: bool = setting(False, "less memory, more time", group=_SPEED)
    enable_xformers_memory_efficient_attention: bool = setting(False, "attention of xformers", group=_SPEED)
    torch_compile: bool = setting(False, "compile the denoiser's blocks: a slow start, then faster", group=_SPEED)
    allow_tf32: bool = setting(False, "faster, coarser float32 on NVIDIA Ampere and later", group=_SPEED)
    dataloader_num_workers: int = setting(0, "processes that load pictures when they are not cached", group=_SPEED)
    compress_activations: bool = setting(
        False, "keep activations for the backward pass in fewer bits: less memory, coarser gradients", group=_SPEED
    )
    factor_cache: Path | None = setting(
        None, "folder of decompositions, shared by all runs (default: the platform's cache folder)", group=_SPEED
    )
    factor_cache_size: str | None = setting(
        None,
        "how much that folder may hold, such as 5GB; what was not used for longest goes first (default: 20 GiB)",
        group=_SPEED,
    )

    @property
    def resolved_off_diagonals(self) -> int:
        """Off-diagonals on each side, the pattern's default filled in."""
        if self.off_diagonals is not None:
            return self.off_diagonals
        return 0 if self.pattern == "plain" else DEFAULT_OFF_DIAGONALS

    @property
    def names_of_target_layers(self) -> list[str]:
        """What ``target_layers`` names, empty if it is None."""
        return [] if self.target_layers is None else [name.strip() for name in self.target_layers.split(",")]

    @property
    def resolved_adam_beta2(self) -> float:
        """The optimizer's own default filled in."""
        if self.adam_beta2 is not None:
            return self.adam_beta2
        return 0.99 if self.optimizer == "lion" else 0.999

    @property
    def loss(self) -> LossSettings:
        """What a sample's loss is."""
        return LossSettings(self.loss_type, self.huber_c, self.huber_schedule, self.snr_gamma)

    @property
    def resolved_optimizer(self) -> str:
        """One of `OPTIMIZERS`, also where it was asked for by ``use_8bit_adam``."""
        return "adamw8bit" if self.use_8bit_adam else self.optimizer

    @property
    def resolved_train_bias(self) -> bool:
        """Whether biases train: what is said, else what the method says."""
        return self.method == "vectorfit" if self.train_bias is None else self.train_bias

    @property
    def trains_one_dimensional(self) -> bool:
        """Whether anything trains that `learning_rate_1d` is for: biases, norm weights or gates."""
        norms = self.targets == "all" if self.train_norm is None else self.train_norm
        return self.resolved_train_bias or norms or self.init == "official"

    @property
    def freezing(self) -> FreezingSettings | None:
        """When vectors freeze, or None if they don't. Raises `UserError` for numbers that can't be."""
        number = self.freezing_number
        if number is None:
            number = FREEZING.number_of_freezings if self.method == "vectorfit" else 0
        if number == 0:
            return None
        given: dict[str, Any] = {
            "warmup_steps": self.freezing_warmup_steps,
            "interval": self.freezing_interval,
            "top_k": self.freezing_top_k,
            "smoothing": self.freezing_smoothing,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(FREEZING, number_of_freezings=number, **chosen)

    @property
    def checks_result(self) -> bool:
        """Whether the file is compared with the model that trained."""
        return self.validation_prompt is not None if self.check_result is None else self.check_result

    @property
    def pictures_per_step(self) -> int:
        """Photos that one process sees in one optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps

    def steps(self, number_of_photos: int, number_of_processes: int = 1) -> int:
        """Optimizer steps of the run."""
        if self.max_train_steps is not None:
            return self.max_train_steps
        if self.num_train_epochs is not None:
            return self.num_train_epochs * self._steps_per_pass(number_of_photos, number_of_processes)
        return DEFAULT_TRAIN_STEPS

    def steps_between_checkpoints(self, steps: int) -> int:
        """Optimizer steps from one checkpoint to the next in a run of ``steps``."""
        return self.checkpointing_steps or min(MOST_STEPS_AT_RISK, max(1, steps // 10))

    def text_encoder_steps(self, steps: int) -> float | None:
        """Steps of a run of ``steps`` in which the text encoder trains; None for all of them."""
        limit = self.stop_text_encoder_training
        return limit if limit is None or limit >= 1 else float(max(1, round(limit * steps)))

    def steps_between_samples(self, number_of_photos: int, number_of_processes: int = 1) -> int:
        """Optimizer steps from one validation to the next."""
        if self.validation_epochs is not None:
            return self.validation_epochs * self._steps_per_pass(number_of_photos, number_of_processes)
        return self.validation_steps

    def _steps_per_pass(self, number_of_photos: int, number_of_processes: int) -> int:
        return -(-number_of_photos // (self.pictures_per_step * number_of_processes))
