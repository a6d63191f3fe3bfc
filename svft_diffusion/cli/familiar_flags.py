"""Flags of other DreamBooth trainers that are none here: what to do instead, or why nothing need be done.

They are those of diffusers' DreamBooth examples and their offspring, so that a command line from there runs, or says at
once all that has to change in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from svft_diffusion.errors import UserError


class SortedArguments(NamedTuple):
    """A command line without the flags of other trainers."""

    ours: list[str]
    problems: list[str]  # a line for each flag that has to go, with what to do instead
    notes: list[str]  # a line for each that changes nothing, and was left out


# What has to change. Nothing is translated silently: who reads the line knows what the run does.
INSTEAD = {
    "tokenizer_name": "the base model's own tokenizer is used; leave it out",
    "tokenizer_max_length": "prompts are read in the length of the base model; --max_sequence_length is for T5",
    "text_encoder_use_attention_mask": "it is for DeepFloyd IF, which can't be trained here; leave it out",
    "class_labels_conditioning": "it is for DeepFloyd IF, which can't be trained here; leave it out",
    "validation_images": "it is for upscalers, which can't be trained here; leave it out",
    "validation_scheduler": "samples are drawn with the base model's own scheduler; leave it out",
    "final_validation_prompt": "use --validation_prompt, of which there are samples at the end, too",
    "offset_noise": "write --noise_offset 0.1",
    "clip_skip": "prompts are encoded as when the base model draws; leave it out",
    "lora_alpha": "an adapter's strength is chosen when it is used: svft-diffusion sample --weights; leave it out",
    "lora_dropout": "nothing of the adapter is dropped out; leave it out, or try --adam_weight_decay",
    "lora_layers": "use --target_layers, which takes the same names",
    "lora_blocks": "use --target_layers with names of blocks, such as transformer_blocks.12,transformer_blocks.30",
    "lora_unet_blocks": "use --target_layers with names of blocks, such as up_blocks.0",
    "use_blora": "use --target_layers up_blocks.0.attentions.0 (content), up_blocks.0.attentions.1 (style) or both",
    "use_dora": "that is a kind of LoRA; see --method for what there is here",
    "output_kohya_format": "run svft-diffusion export after training, which writes a LoRA file",
    "no_safe_serialization": "files are safetensors, always; leave it out",
    "adam_weight_decay_text_encoder": "--adam_weight_decay counts for the text encoder, too; leave it out",
    "prodigy_beta3": "Prodigy runs with its own default; leave it out",
    "weighting_scheme": "use --timestep_sampling; its logit_normal is the default with SD 3 and Flux",
    "logit_mean": "--timestep_sampling logit_normal has mean 0 and deviation 1; leave it out",
    "logit_std": "--timestep_sampling logit_normal has mean 0 and deviation 1; leave it out",
    "mode_scale": "there is no mode weighting; see --timestep_sampling",
    "do_edm_style_training": "base models with an EDM scheduler can't be trained here",
    "bnb_quantization_config_path": "use --base_quantization",
    "do_fp8_training": "use --base_quantization",
    "offload": "there is no offloading; use --gradient_checkpointing or a smaller --resolution",
    "dataset_name": "photos come from a folder: --instance_data_dir, with captions by --caption_source metadata",
    "dataset_config_name": "photos come from a folder: --instance_data_dir, with captions by --caption_source metadata",
    "image_column": "photos come from a folder: --instance_data_dir, with captions by --caption_source metadata",
    "caption_column": "captions are beside the photos: --caption_source txt or metadata",
    "read_prompts_from_txts": "use --caption_source txt",
    "cache_dir": "downloads are kept where the environment variable HF_HUB_CACHE says; set that",
    "repeats": "how long the run is, --max_train_steps or --num_train_epochs says; leave it out",
    "pretrained_vae_name_or_path": "it is called --pretrained_vae_model_name_or_path here",
    "not_cache_latents": "write --no-cache_latents",
    "hflip": "use --random_flip",
    "noaug": "photos are mirrored with --random_flip only; use --center_crop to cut no random places",
    "real_prior": "put pictures of the class into --class_data_dir; they are taken first",
    "freeze_model": "use --targets cross-attention, or --target_layers attn2.to_k,attn2.to_v",
    "modifier_token": "use --train_text_encoder_ti with --token_abstraction, the word that stands for the new tokens",
    "initializer_token": "use --initializer_concept, with --train_text_encoder_ti",
    "train_text_encoder_frac": "use --train_text_encoder; with a share below 1, add --stop_text_encoder_training and "
    "the share, else leave it out",
    "save_sample_prompt": "use --validation_prompt",
    "save_sample_negative_prompt": "samples are drawn without a negative prompt; leave it out",
    "n_save_sample": "use --num_validation_images",
    "save_guidance_scale": "samples are drawn with the base model's own guidance; leave it out",
    "save_infer_steps": "samples are drawn with the base model's own number of steps; leave it out",
    "save_interval": "use --checkpointing_steps, and --history_steps for adapters alone",
    "save_min_steps": "every checkpoint is kept but for --checkpoints_total_limit; leave it out",
    "log_interval": "every step is logged; leave it out",
    "prior_generation_scheduler_type": "class pictures are drawn with the base model's own scheduler; leave it out",
    "enable_token_merging": "there is no token merging; leave it out",
}

# What changes nothing, with the values of which that is true; None: any. Flags that list none take no value.
WITHOUT_EFFECT: dict[str, tuple[tuple[str, ...] | None, str]] = {
    "local_rank": (None, "the launcher says it in the environment"),
    "set_grads_to_none": ((), "it is always so"),
    "pre_compute_text_embeddings": ((), "prompts are encoded once wherever the text encoder does not train"),
    "skip_save_text_encoder": ((), "an adapter file holds what was trained, never the text encoder itself"),
    "upcast_before_saving": ((), "values are trained and saved in float32"),
    "skip_final_inference": ((), "samples are drawn where a --validation_prompt is given"),
    "pad_tokens": ((), "prompts are padded as when the base model draws"),
    "prodigy_decouple": (("True", "true", "1"), "Prodigy always runs so"),
    "prodigy_use_bias_correction": (("True", "true", "1"), "Prodigy always runs so"),
    "prodigy_safeguard_warmup": (("True", "true", "1"), "Prodigy always runs so"),
}

_CASELESS = ("optimizer",)  # diffusers writes AdamW


def set_apart(arguments: Sequence[str]) -> SortedArguments:
    """Take the flags of other trainers, with their values, out of a command line."""
    ours: list[str] = []
    problems: list[str] = []
    notes: list[str] = []
    rest = list(arguments)
    while rest:
        flag, *values = rest[: _length_of_first(rest)]
        del rest[: 1 + len(values)]
        name, equals, value = flag.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not flag.startswith("--") or name not in INSTEAD | WITHOUT_EFFECT:
            ours += [part.lower() for part in (flag, *values)] if name in _CASELESS else [flag, *values]
            continue
        if name in WITHOUT_EFFECT:
            harmless, reason = WITHOUT_EFFECT[name]
            taken = 0 if equals or harmless == () else 1
            problems += [f"unknown argument {stray}" for stray in values[taken:]]
            given = [value] if equals else values[:taken]
            if not harmless or all(value in harmless for value in given):
                notes.append(f"--{name} has no effect: {reason}")
            else:
                problems.append(f"--{name}: {reason}; leave it out")
        else:
            problems.append(f"--{name}: {INSTEAD[name]}")
    return SortedArguments(ours, problems, notes)


def refuse_foreign_settings(names: Iterable[str], file: object) -> None:
    """Raise `UserError` if a settings file has a setting of other trainers."""
    for name in names:
        advice = INSTEAD.get(name) or WITHOUT_EFFECT.get(name, ((), ""))[1]
        if advice:
            raise UserError(f"{name} in {file}: {advice}")


def _length_of_first(arguments: Sequence[str]) -> int:
    """Number of arguments up to the next flag."""
    return next((n for n, argument in enumerate(arguments) if n and argument.startswith("--")), len(arguments))
