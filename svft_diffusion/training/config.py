"""Settings of a training run: one dataclass behind the command line, YAML files and the app."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svft_diffusion.adapters.freezing import FreezingSettings
from svft_diffusion.adapters.methods import DEFAULT_FRACTION, INITS, METHODS, SELECTIONS
from svft_diffusion.adapters.targets import DEFAULT_PRESET, PRESETS
from svft_diffusion.data.dataset import INTERPOLATIONS
from svft_diffusion.files.header import VALUE_DTYPES
from svft_diffusion.models import EMBEDDED_MODEL
from svft_diffusion.settings import setting

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
DEFAULT_TRAIN_STEPS = 400
DEFAULT_OFF_DIAGONALS = 2
FREEZING = FreezingSettings()  # its defaults
_PATTERNS = tuple(dict.fromkeys(pattern for method in METHODS.values() for pattern in method.patterns))

_BASE = "base model"
_DATA = "pictures and prompts"
_ADAPTER = "adapter"
_FREEZING = "adaptive vector freezing"
_TRAINING = "training"
_OPTIMIZER = "optimizer"
_PRIOR = "prior preservation"
_OUTPUT = "output and checkpoints"
_LOOKING = "looking while it trains"
_SPEED = "speed and memory"


@dataclass(frozen=True)
class TrainingConfig:
    """What to train on which pictures. Names and meanings follow the DreamBooth LoRA example of diffusers.

    `svft_diffusion.training.checks.check_settings` says whether the settings fit together.
    """

    pretrained_model_name_or_path: str = setting(
        EMBEDDED_MODEL, "base model: toybox (embedded), a diffusers folder, or a Hugging Face Hub name", group=_BASE
    )
    revision: str | None = setting(None, "branch, tag or commit of a Hub model", group=_BASE)
    variant: str | None = setting(None, "file variant of the base model, such as fp16", group=_BASE)
    local_files_only: bool = setting(False, "never ask the Hub; use what was downloaded before", group=_BASE)

    instance_data_dir: Path | None = setting(None, "folder with the photos of the subject (required)", group=_DATA)
    instance_prompt: str | None = setting(
        None, "prompt of the photos, with a rare word for the subject: 'a photo of sks dog' (required)", group=_DATA
    )
    caption_source: str = setting(
        "none",
        "txt: NAME.txt beside a photo holds its whole prompt; photos without one keep --instance_prompt",
        group=_DATA,
        choices=("none", "txt"),
    )
    resolution: int | None = setting(None, "side of the training squares in pixels (default: the base's)", group=_DATA)
    center_crop: bool = setting(False, "cut the middle of a photo, not a random place", group=_DATA)
    image_interpolation_mode: str = setting(
        "lanczos", "how photos are resized", group=_DATA, choices=tuple(INTERPOLATIONS)
    )

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
    train_text_encoder: bool = setting(False, "adapt the text encoder too", group=_ADAPTER)

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

    with_prior_preservation: bool = setting(
        False, "train on pictures of the class beside the photos, so that the class is not forgotten", group=_PRIOR
    )
    class_data_dir: Path | None = setting(None, "folder of class pictures; filled up by the base model", group=_PRIOR)
    class_prompt: str | None = setting(None, "prompt of the class pictures: 'a photo of a dog'", group=_PRIOR)
    class_prompts_file: Path | None = setting(
        None,
        "text file, one prompt a line, taken in turn for the class pictures, each of which trains with its own: "
        "varied scenes here keep the model's scenes intact",
        group=_PRIOR,
    )
    prior_loss_weight: float = setting(1.0, "weight of the class pictures' loss", group=_PRIOR)
    num_class_images: int = setting(100, "class pictures; missing ones are drawn by the base model", group=_PRIOR)
    sample_batch_size: int = setting(4, "class pictures drawn at once", group=_PRIOR)
    prior_generation_num_inference_steps: int = setting(25, "denoising steps of a class picture", group=_PRIOR)
    prior_generation_guidance_scale: float = setting(4.0, "guidance scale of a class picture", group=_PRIOR)
    prior_generation_precision: str | None = setting(
        None,
        "precision of the model that draws them (default: as in training)",
        group=_PRIOR,
        choices=("no", "fp32", "fp16", "bf16"),
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
    timestep_sampling: str = setting(
        "uniform",
        "uniform: all noise levels alike, as in DreamBooth; focused: a quarter uniform, the rest from "
        "sigmoid(0.6 + 0.8 N(0,1)), the upper middle where the subject's shape and colours are decided",
        group=_TRAINING,
        choices=("uniform", "focused"),
    )
    seed: int = setting(0, "seed of everything random; equal settings give an equal file", group=_TRAINING)

    learning_rate: float | None = setting(
        None, "initial learning rate (default: from the table for method, pattern and base)", group=_OPTIMIZER
    )
    text_encoder_lr: float | None = setting(
        None, "learning rate in the text encoder (default: as --learning_rate)", group=_OPTIMIZER
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
    use_8bit_adam: bool = setting(False, "8-bit Adam of bitsandbytes", group=_OPTIMIZER)
    adam_beta1: float = setting(0.9, "Adam's beta1", group=_OPTIMIZER)
    adam_beta2: float = setting(0.999, "Adam's beta2", group=_OPTIMIZER)
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
    checkpointing_steps: int = setting(500, "a checkpoint every so many steps", group=_OUTPUT)
    checkpoints_total_limit: int | None = setting(None, "keep the newest so many checkpoints", group=_OUTPUT)
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
    mixed_precision: str | None = setting(
        None,
        "precision of the frozen model (default: as accelerate is set up); what trains is always float32",
        group=_SPEED,
        choices=("no", "fp16", "bf16"),
    )
    gradient_checkpointing: bool = setting(False, "less memory, more time", group=_SPEED)
    enable_xformers_memory_efficient_attention: bool = setting(False, "attention of xformers", group=_SPEED)
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

    def steps_between_samples(self, number_of_photos: int, number_of_processes: int = 1) -> int:
        """Optimizer steps from one validation to the next."""
        if self.validation_epochs is not None:
            return self.validation_epochs * self._steps_per_pass(number_of_photos, number_of_processes)
        return self.validation_steps

    def _steps_per_pass(self, number_of_photos: int, number_of_processes: int) -> int:
        return -(-number_of_photos // (self.pictures_per_step * number_of_processes))
