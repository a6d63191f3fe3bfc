"""Saving a run and going on with it: the adapter file and the checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from svft_diffusion.adapters import load_adapter_state, save_adapter
from svft_diffusion.errors import UserError
from svft_diffusion.files import AdapterMetadata, check_base, layer_names, matches_of_pipeline, read_adapter
from svft_diffusion.files.model_spec import base_version
from svft_diffusion.files.training_folder import ADAPTER_FILE
from svft_diffusion.models import base_display_name
from svft_diffusion.training.card import saved_settings
from svft_diffusion.training.checkpoints import load_checkpoint_state, save_checkpoint, step_of
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.setup import ADAPTER_NAME, Run
from svft_diffusion.training.subject_words import subject_words
from svft_diffusion.training.thumbnail import jpeg_thumbnail

# What an adapter file says of its making: settings that change its values, and nothing of folders or clocks.
_SETTINGS_IN_FILE = (
    "resolution", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "text_encoder_lr", "learning_rate_1d", "lr_scheduler", "timestep_sampling", "train_text_encoder",
    "with_prior_preservation", "prior_loss_weight", "freezing_number", "freezing_warmup_steps", "freezing_interval",
    "freezing_top_k", "freezing_smoothing", "mixed_precision", "seed",
)  # fmt: skip
# A checkpoint can only be gone on from with the same of these. The optimizer's state brings its settings with it, so
# that new ones would have no effect.
_SETTINGS_OF_CHECKPOINT = (
    "method", "pattern", "off_diagonals", "rank", "fraction", "select", "init", "train_values", "train_bias",
    "train_norm", "compress_activations", "targets", "train_text_encoder", "seed", "learning_rate", "text_encoder_lr",
    "learning_rate_1d", "scale_lr", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "freezing_number",
    "freezing_warmup_steps", "freezing_interval", "freezing_top_k", "freezing_smoothing",
)  # fmt: skip


def save_result(run: Run, path: Path, samples: Sequence[Path] = ()) -> None:
    """Write the adapter as it is now, stored as the settings say, with the first of ``samples`` as its thumbnail.

    Raises:
        UserError: its values are not finite, or one is too large for float16.
    """
    picture = jpeg_thumbnail(samples[0]) if samples and run.config.thumbnail else None
    metadata = replace(_metadata(run), value_dtype=run.config.adapter_dtype, thumbnail=picture)
    save_adapter(run.models, ADAPTER_NAME, path, metadata=metadata)


def _metadata(run: Run) -> AdapterMetadata:
    """What the settings say of the adapter. It was trained at strength 1, and 0 is the base: no more is known."""
    version = base_version(run.family.pipeline)
    return replace(
        described(run.config),
        base_family=run.family.name,
        base_architecture="" if version is None else version.architecture,
        base_digests=run.base_digests,
    )


def described(config: TrainingConfig) -> AdapterMetadata:
    """What the settings alone say of an adapter."""
    trigger, class_word = subject_words(config.instance_prompt, config.class_prompt)
    settings = saved_settings(config)
    return AdapterMetadata(
        base_name=base_display_name(config.pretrained_model_name_or_path),
        trigger=trigger,
        class_word=class_word,
        instance_prompt=config.instance_prompt,
        class_prompt=config.class_prompt,
        title=" ".join(part for part in (trigger, class_word) if part) or None,
        training={name: settings[name] for name in _SETTINGS_IN_FILE if name in settings},
    )


def save_run(run: Run, step: int) -> None:
    """Write the checkpoint of a run that has finished ``step`` steps."""
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        state = {
            "settings": {name: getattr(run.config, name) for name in _SETTINGS_OF_CHECKPOINT},
            "optimizer": run.optimizer.state_dict(),
            "lr_scheduler": run.lr_scheduler.state_dict(),
            "freezing": run.freezing.state_dict() if run.freezing is not None else None,
            "gradient_scaler": scaler.state_dict() if scaler is not None else None,
        }

        def write_adapter(path: Path) -> None:
            # As float32, whatever the settings say: going on from it loses nothing.
            save_adapter(run.models, ADAPTER_NAME, path, metadata=_metadata(run))

        save_checkpoint(run.config.output_dir, step, write_adapter, state, run.config.checkpoints_total_limit)
    run.accelerator.wait_for_everyone()


def resume(run: Run, checkpoint: Path) -> int:
    """Put everything into the state of ``checkpoint`` and return its step.

    Raises:
        UserError: the checkpoint is damaged, of another adapter or base, or already past the end.
    """
    state = load_checkpoint_state(checkpoint)
    for name, value in state["settings"].items():
        if getattr(run.config, name) != value:
            raise UserError(
                f"{checkpoint.name} was trained with {name}={value}, now it is {getattr(run.config, name)}: "
                "resume with the same, or start a new run in another --output_dir"
            )
    step = step_of(checkpoint)
    if step > run.total_steps:
        raise UserError(f"{checkpoint.name} is past --max_train_steps {run.total_steps}; ask for more steps")
    header, tensors = read_adapter(checkpoint / ADAPTER_FILE)
    matches = matches_of_pipeline(run.models, layer_names(tensors), header.base.digests)
    check_base(header, matches, base_display_name(run.config.pretrained_model_name_or_path))
    load_adapter_state(run.models, ADAPTER_NAME, tensors)
    run.optimizer.load_state_dict(state["optimizer"])
    run.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if run.freezing is not None:
        run.freezing.load_state_dict(state["freezing"])
    if run.accelerator.scaler is not None and state["gradient_scaler"] is not None:
        run.accelerator.scaler.load_state_dict(state["gradient_scaler"])
    return step
