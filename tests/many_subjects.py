"""Runs of `train-many` on a tiny base model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from training_runs import PROMPT, short_run

from svft_diffusion.cli.main import run_command
from svft_diffusion.settings import config_from_mapping
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.many.listing import read_list
from svft_diffusion.training.many.worker import Job
from svft_diffusion.training.trainer import train

REPOSITORY = Path(__file__).parent.parent
Rows = Sequence[dict[str, Any]]


class World:
    """A tiny base model, photos of two subjects, and the settings that rows share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = short_run(folder)
        shutil.copytree(folder / "photos", folder / "others")
        (folder / "others" / "1.png").unlink()
        self.output = folder / "all"
        self.shared = {
            "pretrained_model_name_or_path": config.pretrained_model_name_or_path,
            "instance_prompt": PROMPT,
            "instance_data_dir": str(config.instance_data_dir),
            "train_batch_size": 2,
            "max_train_steps": 2,
            "checkpointing_steps": 1,
            "learning_rate": 0.05,
            "report_to": "none",
            "history_steps": 0,
        }

    def arguments(self, rows: Rows, **shared: Any) -> list[str]:
        """Write the list, and the shared settings as a file for ``--config``."""
        listed, settings = self.folder / "list.yaml", self.folder / "shared.yaml"
        listed.write_text(yaml.safe_dump(list(rows)), encoding="utf-8")
        settings.write_text(yaml.safe_dump(self.shared | shared), encoding="utf-8")
        return [str(listed), "--config", str(settings), "--output_dir", str(self.output)]

    def run(self, rows: Rows, *flags: str, **shared: Any) -> int:
        """The exit code of the command."""
        try:
            return run_command("train-many", [*self.arguments(rows, **shared), *flags])
        except SystemExit as end:
            return int(end.code or 0)

    def launch(self, rows: Rows, *launcher: str, **shared: Any) -> subprocess.Popen[str]:
        command = [sys.executable, *launcher, "-m", "svft_diffusion", "train-many", *self.arguments(rows, **shared)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)

    def job(self, rows: Rows) -> Job:
        """What the processes of the command work on."""
        listed = read_list(Path(self.arguments(rows)[0]), self.shared, self.output)
        return Job(listed.rows, self.output, self.folder)

    def adapter(self, name: str) -> bytes:
        return (self.output / name / "adapter.safetensors").read_bytes()

    def alone(self, row: dict[str, Any], **shared: Any) -> bytes:
        """The adapter of a separate run with the settings of a row."""
        own = {key: value for key, value in row.items() if key != "name"}
        folder = self.folder / f"alone-{row['name']}"
        paths = {key: str(self.folder / value) for key, value in own.items() if key.endswith("_dir")}
        train(config_from_mapping(TrainingConfig, self.shared | shared | own | paths | {"output_dir": str(folder)}))
        return (folder / "adapter.safetensors").read_bytes()

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.output / "report.json").read_text(encoding="utf-8"))
        return report

    def states(self) -> dict[str, str]:
        return {row["name"]: row["state"] for row in self.report()["rows"]}
