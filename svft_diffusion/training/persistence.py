"""Saving a run and going on with it: the adapter file and the checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from svft_diffusion.training.defaults import resolve_defaults
from svft_diffusion.training.optimizers import scale_of_rates
from svft_diffusion.training.run import ADAPTER_NAME, Run
from svft_diffusion.training.subjects import Subject
from svft_diffusion.training.thumbnail import jpeg_thumbnail
from svft_diffusion.training.token_words import trigger_and_class

# What an adapter file says of its making: settings that change its values, and nothing of folders or clocks.
_SETTINGS_IN_FILE = (
    "resolution", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "text_encoder_lr", "learning_rate_1d", "lr_scheduler", "timestep_sampling", "train_text_encoder",
    "with_prior_preservation", "prior_loss_weight", "freezing_number", "freezing_warmup_steps", "freezing_interval",
    "freezing_top_k", "freezing_smoothing", "mixed_precision", "seed",
)  # fmt: skip
# And these where they are not the defaults, so that files stay small.
_SPECIAL_SETTINGS_IN_FILE = (
    "optimizer", "stop_text_encoder_training", "loss_type", "huber_c", "huber_schedule", "snr_gamma", "noise_offset",
    "input_perturbation", "value_norm_penalty", "use_ema", "ema_decay", "aspect_ratio_buckets", "random_flip",
    "cut_mix_unmix", "cut_mix_probability", "cut_mix_prompt", "unmix_loss_weight",
    "masked_loss", "unmasked_weight", "prior_source", "caption_dropout", "target_layers", "train_text_encoder_ti",
    "num_new_tokens_per_abstraction", "initializer_concept", "train_text_encoder_ti_frac", "token_learning_rate",
    "keep_token_norm",
    "base_quantization",
)  # fmt: skip
# A checkpoint can only be gone on from with the same of these. The optimizer's state brings its settings with it, so
# that new ones would have no effect.
_SETTINGS_OF_CHECKPOINT = (
    "cut_mix_unmix", "cut_mix_probability", "cut_mix_prompt", "unmix_loss_weight",
    "train_text_encoder_ti", "token_abstraction", "num_new_tokens_per_abstraction", "initializer_concept",
    "token_learning_rate", "keep_token_norm",
    "method", "pattern", "off_diagonals", "rank", "fraction", "select", "init", "train_values", "train_bias",
    "train_norm", "compress_activations", "targets", "train_text_encoder", "seed", "learning_rate", "text_encoder_lr",
    "learning_rate_1d", "stop_text_encoder_training", "use_ema", "ema_decay", "optimizer", "scale_lr", "adam_beta1",
    "adam_beta2", "adam_weight_decay", "adam_epsilon", "freezing_number", "freezing_warmup_steps", "freezing_interval",
    "freezing_top_k", "freezing_smoothing", "target_layers", "resolution", "aspect_ratio_buckets", "center_crop",
    "random_flip", "image_interpolation_mode", "masked_loss", "unmasked_weight", "caption_dropout",
    "base_quantization",
)  # fmt: skip
# Beside them: of `train_text_encoder_ti_frac`, and what changes with other settings, but only for some optimizers.
_TOKEN_STEPS = "token_steps"
_SCALE_OF_RATES, _OWN_WARMUP = "pictures_per_step_of_scale_lr", "lr_warmup_steps_of_schedulefree"


def save_result(run: Run, path: Path, samples: Sequence[Path] = (), *, finished_steps: int | None = None) -> None:
    """Write the adapter as it is now, stored as the settings say, with the first of ``samples`` as its thumbnail.

    Args:
        finished_steps: to be told by the file, where it is not the result of the whole run.

    Raises:
        UserError: its values are not finite, or one is too large for float16.
    """
    picture = jpeg_thumbnail(samples[0]) if samples and run.config.thumbnail else None
    metadata = replace(_metadata(run), value_dtype=run.config.adapter_dtype, thumbnail=picture)
    if finished_steps is not None:
        metadata = replace(metadata, training={**metadata.training, "finished_steps": finished_steps})
    with run.averaged_values():
        save_adapter(run.carriers, ADAPTER_NAME, path, metadata=metadata)


def _metadata(run: Run) -> AdapterMetadata:
    """What the settings say of the adapter. It was trained at strength 1, and 0 is the base: no more is known."""
    version = base_version(run.family.pipeline)
    return replace(
        described(run.config, run.subjects),
        base_family=run.family.name,
        base_architecture="" if version is None else version.architecture,
        base_digests=run.base_digests,
    )


def described(config: TrainingConfig, subjects: Sequence[Subject]) -> AdapterMetadata:
    """What the settings alone say of an adapter. Of several subjects, all triggers are told, and the first's prompt."""
    words = [trigger_and_class(config, subject) for subject in subjects]
    triggers = [trigger for trigger, _ in words if trigger]
    names = [" ".join(part for part in pair if part) for pair in words]
    settings, defaults = saved_settings(config), saved_settings(TrainingConfig())
    special = [name for name in _SPECIAL_SETTINGS_IN_FILE if settings.get(name) != defaults.get(name)]
    return AdapterMetadata(
        base_name=base_display_name(config.pretrained_model_name_or_path),
        trigger=", ".join(triggers) or None,
        class_word=words[0][1] if len(words) == 1 else None,
        instance_prompt=subjects[0].instance_prompt,
        class_prompt=subjects[0].class_prompt,
        title=", ".join(name for name in names if name) or None,
        training={name: settings[name] for name in (*_SETTINGS_IN_FILE, *special) if name in settings},
    )


def save_run(run: Run, step: int) -> None:
    """Write the checkpoint of a run that has finished ``step`` steps.

    Raises:
        UserError: it can't be written, or a value is not finite; earlier checkpoints are as they were.
    """
    if run.accelerator.is_main_process:
        state = {
            "settings": _settings_to_share(run),
            "pictures": _picture_names(run),
            "pieces": {name: piece.state_dict() for name, piece in run.pieces.items()},
        }

        def write_adapter(path: Path) -> None:
            # As float32, whatever the settings say: going on from it loses nothing.
            with run.averaged_values():
                save_adapter(run.carriers, ADAPTER_NAME, path, metadata=_metadata(run))

        save_checkpoint(run.config.output_dir, step, write_adapter, state, run.config.checkpoints_total_limit)
    run.accelerator.wait_for_everyone()


def _settings_to_share(run: Run) -> dict[str, object]:
    """What a checkpoint and the run that goes on from it must have in common."""
    config = run.config
    return {name: getattr(config, name) for name in _SETTINGS_OF_CHECKPOINT} | {
        _TOKEN_STEPS: run.token_steps,
        _SCALE_OF_RATES: scale_of_rates(config, run.accelerator.num_processes),
        _OWN_WARMUP: config.lr_warmup_steps if config.resolved_optimizer == "schedulefree" else None,
    }


def _check_settings(run: Run, checkpoint: str, saved: Mapping[str, object]) -> None:
    """Raise `UserError` if a run can't go on from a checkpoint with other settings than its own.

    A checkpoint that lacks one is of a version before there was the setting: then it had what is now the default.
    """
    for name, value in _settings_to_share(run).items():
        if name not in saved:
            default = _default_setting(run, name)
            if value != default:
                raise UserError(
                    f"{checkpoint} was written by another version of this program, without {name}, so that only its "
                    f"default {default} can be gone on with, not {value}"
                )
        elif saved[name] != value:
            raise UserError(
                f"{checkpoint} was trained with {name}={saved[name]}, now it is {value}: resume with the same, or "
                "start a new run in another --output_dir"
            )


def _default_setting(run: Run, name: str) -> object:
    """What `_settings_to_share` says of a setting that nobody gave, with all others as they are."""
    if name == _TOKEN_STEPS:
        return None
    if name in (_SCALE_OF_RATES, _OWN_WARMUP):  # nothing else tells what it was
        return _settings_to_share(run)[name]
    plain = replace(run.config, **{name: getattr(TrainingConfig(), name)})
    return getattr(resolve_defaults(plain, run.family, len(run.streams[0].pictures), run.accelerator), name)


def _picture_names(run: Run) -> dict[str, list[str]]:
    return {stream.kind: [picture.path.name for picture in stream.pictures] for stream in run.streams}


def resume(run: Run, checkpoint: Path) -> int:
    """Put everything into the state of ``checkpoint`` and return its step.

    Raises:
        UserError: the checkpoint is damaged, of another adapter or base, or already past the end.
    """
    state = load_checkpoint_state(checkpoint)
    _check_settings(run, checkpoint.name, state["settings"])
    step = step_of(checkpoint)
    if step > run.total_steps:
        raise UserError(f"{checkpoint.name} is past --max_train_steps {run.total_steps}; ask for more steps")
    header, tensors = read_adapter(checkpoint / ADAPTER_FILE)
    matches = matches_of_pipeline(run.models, layer_names(tensors), header.base.digests)
    check_base(header, matches, base_display_name(run.config.pretrained_model_name_or_path))
    load_adapter_state(run.carriers, ADAPTER_NAME, tensors)
    saved, pieces = state["pieces"], run.pieces
    if different := sorted(saved.keys() ^ pieces.keys()):
        lack = "has no" if different[0] in pieces else "has a"
        raise UserError(
            f"{checkpoint.name} {lack} state of {different[0]}, unlike this run: resume with the settings that it was "
            "trained with, or start a new run in another --output_dir"
        )
    for name, piece in pieces.items():
        try:
            piece.load_state_dict(saved[name])
        except (ValueError, KeyError, TypeError, RuntimeError) as problem:
            reason = " ".join(str(problem).split())
            message = f"{checkpoint.name} has a state of {name} that does not fit this run: {reason}"
            raise UserError(message) from problem
    if state["pictures"] != _picture_names(run):
        run.accelerator.print(f"the pictures are not those of {checkpoint.name}: training goes on with the new ones")
    return step
