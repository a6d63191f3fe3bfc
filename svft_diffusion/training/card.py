"""The model card beside an adapter, ``README.md``, as the Hugging Face Hub reads it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData

from svft_diffusion.files import AdapterHeader
from svft_diffusion.files.training_folder import ADAPTER_FILE
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.inspection.card import method_in_words
from svft_diffusion.inspection.facts import AdapterFacts, facts_of_adapter
from svft_diffusion.markdown import code_block, plain, table
from svft_diffusion.models import EMBEDDED_MODEL, base_display_name, hub_name
from svft_diffusion.models.loading import is_single_file
from svft_diffusion.settings import config_to_mapping
from svft_diffusion.training.config import TrainingConfig

CARD_FILE = "README.md"
CONFIG_FILE = "config.yaml"

# Said in the card; the rest is in config.yaml.
_SHOWN_SETTINGS = (
    "method", "pattern", "off_diagonals", "rank", "fraction", "select", "init", "train_values", "train_bias",
    "train_norm", "targets", "target_layers", "train_text_encoder", "freezing_number", "freezing_warmup_steps",
    "freezing_interval", "freezing_top_k", "freezing_smoothing", "resolution", "max_train_steps", "train_batch_size",
    "gradient_accumulation_steps", "learning_rate", "text_encoder_lr", "learning_rate_1d", "lr_scheduler",
    "timestep_sampling", "with_prior_preservation", "class_prompt", "prior_loss_weight", "mixed_precision", "seed",
)  # fmt: skip
# And these where new tokens train.
_SHOWN_OF_TOKENS = (
    "token_abstraction", "num_new_tokens_per_abstraction", "initializer_concept", "train_text_encoder_ti_frac",
    "token_learning_rate", "keep_token_norm",
)  # fmt: skip


_NOT_SAVED = (
    "hub_token", "resume_from_checkpoint", "factor_cache", "factor_cache_size", "encoding_cache", "encoding_cache_size",
    "dry_run",
)  # fmt: skip

# What reads a single file, by the family of the base.
_PIPELINES = {
    "stable-diffusion": "StableDiffusionPipeline",
    "stable-diffusion-xl": "StableDiffusionXLPipeline",
    "stable-diffusion-3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}


def saved_settings(config: TrainingConfig) -> dict[str, object]:
    """The settings that make a run, without those that belong to one start of it, one machine, or to nobody else."""
    settings = config_to_mapping(config)
    for name in _NOT_SAVED:
        settings.pop(name)
    return {name: value for name, value in settings.items() if value is not None}


def write_config(config: TrainingConfig, path: Path | None = None) -> Path:
    """Write the settings as YAML that ``--config`` takes, to ``path`` or into the output folder."""
    path = path or config.output_dir / CONFIG_FILE
    _write(path, yaml.safe_dump(saved_settings(config), sort_keys=False, allow_unicode=True))
    return path


def write_card(config: TrainingConfig, samples: Sequence[Path]) -> Path:
    """Write ``README.md`` beside the adapter: what it is, ``samples`` of it, how to load it, how it was made."""
    facts = facts_of_adapter((config.output_dir / ADAPTER_FILE).read_bytes(), ADAPTER_FILE)
    # Of several subjects, the first's; and with new tokens in it.
    prompt, shown = config.instance_prompt or facts.header.instance_prompt, config.validation_prompt
    config = dataclasses.replace(
        config,
        instance_prompt=None if prompt is None else config.with_tokens(prompt),
        validation_prompt=None if shown is None else config.with_tokens(shown),
    )
    pictures = [sample.relative_to(config.output_dir).as_posix() for sample in samples]
    path = config.output_dir / CARD_FILE
    text = f"---\n{_front_matter(config, pictures)}\n---\n\n{_body(config, facts, pictures)}"
    # A lone surrogate, as the arguments of a command may hold, can't be written.
    _write(path, text.encode("utf-8", "replace").decode("utf-8"))
    return path


def _front_matter(config: TrainingConfig, pictures: Sequence[str]) -> str:
    base = hub_name(config.pretrained_model_name_or_path)
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        instance_prompt=config.instance_prompt,
        tags=["text-to-image", "diffusers", "diffusers-training", "dreambooth", "svft-diffusion", config.method],
        widget=[{"text": config.validation_prompt, "output": {"url": picture}} for picture in pictures] or None,
    )
    return data.to_yaml()


def _body(config: TrainingConfig, facts: AdapterFacts, pictures: Sequence[str]) -> str:
    header = facts.header
    alternative = plain(config.validation_prompt or "")
    settings = config_to_mapping(config)
    if config.target_layers is not None:
        settings["targets"] = None  # which plays no part then
    shown = _SHOWN_SETTINGS + (_SHOWN_OF_TOKENS if config.train_text_encoder_ti else ())
    parts = [
        f"# {plain(header.title or header.instance_prompt or ADAPTER_FILE)}",
        "\n".join(f"![{alternative}]({picture})" for picture in pictures),
        f"An adapter for {_base_in_words(config)} in the singular-value space of its weights.",
        table(["", ""], ((title, plain(text)) for title, text in _facts(facts).items() if text)),
        "## Use with svft-diffusion",
        *_with_this_package(config),
        "## Use with diffusers alone",
        *_with_diffusers_alone(config, header),
        "## Training",
        table(
            ["setting", "value"],
            ([f"`{name}`", plain(str(settings[name]))] for name in shown if settings[name] is not None),
        ),
        "## Terms",
        "No licence is stated here; the base model's terms hold too. The people and things in the training photos may "
        "not be yours to draw: ask before you share.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(facts: AdapterFacts) -> dict[str, str | None]:
    header = facts.header
    low, high = header.strength_range
    layers = " and ".join(f"{count} layers of {component}" for component, count in header.components.items())
    return {
        "prompt": header.instance_prompt,
        "trigger": header.trigger,
        "class word": header.class_word,
        "strength": f"{header.suggested_strength:g} suggested, from {low:g} to {high:g}; 0 is the base model",
        "method": method_in_words(header),
        "trained": f"{sum(facts.trained.values()):,} numbers in {layers}, stored as {header.value_dtype}",
        "size": f"{facts.sizes.file / 1000:,.1f} kB",
        "base model": f"{header.base.name} ({header.base.architecture or header.base.family}), of which the adapted "
        f"weights have the fingerprint {header.base.short_fingerprint}",
    }


def _with_this_package(config: TrainingConfig) -> list[str]:
    base, prompt = _base_argument(config), config.instance_prompt or ""
    command = f"svft-diffusion sample --pretrained_model_name_or_path={shlex.quote(base)} {_version_flags(config)}"
    return [
        code_block("shell", f"{command}--adapter={ADAPTER_FILE} --prompt={shlex.quote(prompt)}"),
        code_block(
            "python",
            "from svft_diffusion import load_adapter\nfrom svft_diffusion.models import load_pipeline\n\n"
            f"pipe = load_pipeline({base!r}{_version_arguments(config)})\n"
            f"load_adapter(pipe, {ADAPTER_FILE!r})\n"
            f"image = pipe({prompt!r}).images[0]",
        ),
    ]


def _with_diffusers_alone(config: TrainingConfig, header: AdapterHeader) -> list[str]:
    """How to turn the adapter into what needs diffusers alone: a LoRA, or the whole model."""
    base, prompt = _base_argument(config), config.instance_prompt or ""
    left_out = ""
    if header.tokens:
        prompt = config.without_tokens(prompt)
        left_out = "New tokens and what they have learned are left out here, so prompts are written without them. "
    options = f"{ADAPTER_FILE} --base={shlex.quote(base)} {_version_flags(config)}"
    parts = []
    if config.pretrained_model_name_or_path != EMBEDDED_MODEL:  # diffusers knows no model of that name
        lost = " Biases and norms that the adapter trains are not in it." if _trains_more_than_weights(header) else ""
        parts += [
            f"{left_out}Written as a LoRA, once. One of a low rank comes close, by the error that the command prints; "
            f"with `--rank=full` it is exact, and large.{lost}",
            code_block("shell", f"svft-diffusion export {options}-o lora.safetensors"),
            code_block(
                "python",
                f"{_loading_with_diffusers(config, header)}\n"
                'pipe.load_lora_weights(".", weight_name="lora.safetensors")\n'
                f"image = pipe({prompt!r}).images[0]",
            ),
        ]
    return [
        *parts,
        "Or written into a copy of the base model, once:"
        if parts
        else f"{left_out}Written into a copy of the base model, once:",
        code_block("shell", f"svft-diffusion merge {options}-o merged-model"),
        code_block(
            "python",
            "from diffusers import DiffusionPipeline\n\n"
            'pipe = DiffusionPipeline.from_pretrained("merged-model")\n'
            f"image = pipe({prompt!r}).images[0]",
        ),
    ]


def _loading_with_diffusers(config: TrainingConfig, header: AdapterHeader) -> str:
    if is_single_file(config.pretrained_model_name_or_path):
        kind, call = _PIPELINES[header.base.family], "from_single_file"
    else:
        kind, call = "DiffusionPipeline", "from_pretrained"
    arguments = f"{_base_argument(config)!r}{_version_arguments(config)}"
    return f"from diffusers import {kind}\n\npipe = {kind}.{call}({arguments})"


def _trains_more_than_weights(header: AdapterHeader) -> bool:
    norms = header.targets == "all" if header.train_norm is None else header.train_norm
    return header.train_bias or norms


def _base_argument(config: TrainingConfig) -> str:
    """The base as the commands take it."""
    if config.pretrained_model_name_or_path == EMBEDDED_MODEL:
        return EMBEDDED_MODEL
    return (
        hub_name(config.pretrained_model_name_or_path)
        or f"path/to/{base_display_name(config.pretrained_model_name_or_path)}"
    )


def _base_in_words(config: TrainingConfig) -> str:
    if config.pretrained_model_name_or_path == EMBEDDED_MODEL:
        return f"{EMBEDDED_MODEL}, the model inside svft-diffusion,"
    name = hub_name(config.pretrained_model_name_or_path)
    if name is not None:
        return f"[{plain(name)}](https://huggingface.co/{name})"
    return f"{plain(base_display_name(config.pretrained_model_name_or_path))}, a model that lay on a local disk,"


def _version_flags(config: TrainingConfig) -> str:
    given = {"revision": config.revision, "variant": config.variant}
    return "".join(f"--{name}={shlex.quote(value)} " for name, value in given.items() if value is not None)


def _version_arguments(config: TrainingConfig) -> str:
    given = {"revision": config.revision, "variant": config.variant}
    return "".join(f", {name}={value!r}" for name, value in given.items() if value is not None)


def _write(path: Path, text: str) -> None:
    with replace_when_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
