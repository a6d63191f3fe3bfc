"""The model card beside an adapter."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import yaml

from svft_diffusion.models import base_display_name
from svft_diffusion.settings import config_to_mapping
from svft_diffusion.training.checkpoints import ADAPTER_FILE
from svft_diffusion.training.config import TrainingConfig

CARD_FILE = "README.md"
CONFIG_FILE = "config.yaml"
_EXAMPLE_FILE = "example.png"

# Said in the card; the rest is in config.yaml.
_SHOWN_SETTINGS = (
    "method", "pattern", "off_diagonals", "rank", "fraction", "select", "init", "train_values", "train_bias",
    "train_norm", "targets", "train_text_encoder", "freezing_number", "freezing_warmup_steps", "freezing_interval",
    "freezing_top_k", "freezing_smoothing", "resolution", "max_train_steps", "train_batch_size",
    "gradient_accumulation_steps", "learning_rate", "text_encoder_lr", "learning_rate_1d", "lr_scheduler",
    "timestep_sampling", "with_prior_preservation", "class_prompt", "prior_loss_weight", "mixed_precision", "seed",
)  # fmt: skip


def saved_settings(config: TrainingConfig) -> dict[str, object]:
    """The settings that make a run, without those that belong to one start of it, one machine, or to nobody else."""
    settings = config_to_mapping(config)
    for name in ("hub_token", "resume_from_checkpoint", "factor_cache", "factor_cache_size"):
        settings.pop(name)
    return {name: value for name, value in settings.items() if value is not None}


def write_config(config: TrainingConfig) -> Path:
    """Write the settings as YAML that ``--config`` takes."""
    path = config.output_dir / CONFIG_FILE
    _write(path, yaml.safe_dump(saved_settings(config), sort_keys=False, allow_unicode=True))
    return path


def write_card(config: TrainingConfig, trained_values: int, samples: list[Path]) -> Path:
    """Write ``README.md``: what the adapter is, an example picture, how to load it, how it was made."""
    base = base_display_name(config.pretrained_model_name_or_path)
    front_matter: dict[str, object] = {
        "base_model": base,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": config.instance_prompt,
        "tags": ["text-to-image", "diffusers", "dreambooth", "svft-diffusion", config.method],
    }
    if samples:
        shutil.copyfile(samples[0], config.output_dir / _EXAMPLE_FILE)
        front_matter["widget"] = [{"text": config.validation_prompt, "output": {"url": _EXAMPLE_FILE}}]
    path = config.output_dir / CARD_FILE
    header = yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True)
    _write(path, f"---\n{header}---\n\n{_body(config, base, trained_values, bool(samples))}")
    return path


def _body(config: TrainingConfig, base: str, trained_values: int, has_example: bool) -> str:
    size = (config.output_dir / ADAPTER_FILE).stat().st_size
    settings = config_to_mapping(config)
    rows = [f"| `{name}` | {settings[name]} |" for name in _SHOWN_SETTINGS if settings[name] is not None]
    parts = [
        f"# {config.instance_prompt}",
        f"An adapter for {base} in the singular-value space of its weights ({config.method}, {config.pattern}): "
        f"{trained_values:,} trained values, {size / 1000:,.0f} kB.",
        f"Subject prompt: `{config.instance_prompt}`",
        f"![{config.validation_prompt}]({_EXAMPLE_FILE})" if has_example else "",
        "## Use",
        f"```shell\nsvft-diffusion sample --pretrained_model_name_or_path {base} --adapter {ADAPTER_FILE} "
        f'--prompt "{config.instance_prompt}"\n```',
        "```python\nfrom svft_diffusion import load_adapter\nfrom svft_diffusion.models import load_pipeline\n\n"
        f'pipe = load_pipeline("{base}")\nload_adapter(pipe, "{ADAPTER_FILE}")\n'
        f'image = pipe("{config.instance_prompt}").images[0]\n```',
        "## Settings",
        "| setting | value |\n| --- | --- |\n" + "\n".join(rows),
        "The people and things in the training photos may not be yours to draw: ask before you share.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
