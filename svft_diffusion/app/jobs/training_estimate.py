"""How long a training would take: from two real steps on this machine, which are taken once for the same settings."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from svft_diffusion.app.jobs.job_process import run_to_the_end
from svft_diffusion.errors import UserError
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.training.card import saved_settings, write_config
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.status import without_folders

_FOLDER = ".estimates"
_SECONDS_AT_MOST = 900
# The time of a step does not follow from these.
_WITHOUT_INFLUENCE = (
    "output_dir", "instance_data_dir", "instance_prompt", "class_prompt", "class_prompts_file", "class_data_dir",
    "validation_prompt", "max_train_steps", "validation_steps", "history_steps", "checkpointing_steps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a training would need."""

    seconds: float
    peak_memory: int  # bytes
    device: str


class Estimates:
    """Remembers what was measured, in a folder below that of the trainings."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        self._folder = folder / _FOLDER
        self._device = device
        self._measuring = threading.Lock()

    def known(self, config: TrainingConfig) -> Estimate | None:
        """What an earlier measurement says of the run."""
        try:
            return _estimate(json.loads(self._file(config).read_text(encoding="utf-8")), config)
        except (OSError, ValueError, KeyError, TypeError):  # none, or by another version
            return None

    def measure(self, config: TrainingConfig) -> Estimate:
        """`svft-diffusion train --dry_run`, where no earlier one tells.

        Raises:
            UserError: what the run itself would be refused for, a lack of memory included.
        """
        with self._measuring:
            if (known := self.known(config)) is not None:
                return known
            measured = _dry_run(config, self._device)
            # What can't be kept is measured again.
            with contextlib.suppress(UserError), replace_when_whole(self._file(config), flush=False) as unfinished:
                unfinished.write_text(json.dumps(measured), encoding="utf-8")
            return _estimate(measured, config)

    def _file(self, config: TrainingConfig) -> Path:
        settings = {name: value for name, value in saved_settings(config).items() if name not in _WITHOUT_INFLUENCE}
        settings["device"] = self._device
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
        return self._folder / f"{name}.json"


def _dry_run(config: TrainingConfig, device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        tried = dataclasses.replace(config, output_dir=Path(folder) / "out")
        if config.with_prior_preservation and config.prior_source == "images" and config.class_data_dir is None:
            tried = dataclasses.replace(tried, class_data_dir=Path(folder) / "class_images")
        file = write_config(tried, Path(folder) / "config.yaml")
        try:
            arguments = ["train", "--config", str(file), "--dry_run", "--json"]
            ended = run_to_the_end(arguments, device=device, seconds=_SECONDS_AT_MOST)
        except subprocess.TimeoutExpired:
            raise UserError("the time could not be measured: two steps took too long on this machine") from None
        except OSError as problem:
            raise UserError(f"the time could not be measured: {problem.strerror or problem}") from None
    if ended.returncode == 0:
        measured: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return measured
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    reason = without_folders(lines[-1].removeprefix("error: ")) if lines else "the process ended without a word"
    raise UserError(f"this training would fail: {reason}")


def _estimate(measured: dict[str, Any], config: TrainingConfig) -> Estimate:
    steps = config.max_train_steps or int(measured["steps"])
    # The same settings draw as many samples each time; how often follows from the steps.
    draws = 0 if config.validation_prompt is None else steps // config.validation_steps + 1
    seconds = (
        measured["seconds_to_start"]
        + steps * measured["seconds_per_step"]
        + measured["class_images"] * measured["seconds_per_class_image"]
        + draws * config.num_validation_images * measured["seconds_per_sample"]
    )
    return Estimate(float(seconds), int(measured["peak_memory"]), str(measured["device"]))
