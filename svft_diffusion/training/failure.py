"""``failure_report.json``: what to know of a run that failed, without folders of the machine, to look at or to send."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import PurePath

from svft_diffusion.errors import UserError
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.settings import config_to_mapping
from svft_diffusion.training.card import saved_settings
from svft_diffusion.training.checkpoints import last_good_checkpoint
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.run import Run
from svft_diffusion.training.status import reason_in_one_line

FAILURE_FILE = "failure_report.json"
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "pillow")


def write_failure_report(run: Run, error: BaseException, last_losses: Sequence[float]) -> None:
    """Write the report into the output folder; where that can't be done, the error itself must do.

    Args:
        last_losses: of the last steps, the latest last.
    """
    config = run.config
    checkpoint = last_good_checkpoint(config.output_dir)
    report = {
        "error": reason_in_one_line(error),
        "finished_steps": run.finished_steps,
        "files": list(getattr(error, "files", [])),
        "last_good_checkpoint": None if checkpoint is None else checkpoint.name,
        "last_losses": list(last_losses),
        "settings": _settings_without_folders(config),
        "device": str(run.accelerator.device),
        "versions": _versions(),
    }
    file = config.output_dir / FAILURE_FILE
    with contextlib.suppress(UserError), replace_when_whole(file) as unfinished:
        unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _settings_without_folders(config: TrainingConfig) -> dict[str, object]:
    plain = config_to_mapping(config)
    paths = {name for name, value in vars(config).items() if isinstance(value, PurePath)}
    paths |= {"pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"}
    return {
        name: PurePath(str(plain[name])).name if name in paths and PurePath(str(plain[name])).is_absolute() else value
        for name, value in saved_settings(config).items()
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in ("svft-diffusion", *_PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
