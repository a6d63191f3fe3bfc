"""What is known of a row between two starts of the command: ``subject.json`` in its folder, and who trains it now."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from svft_diffusion.errors import UserError
from svft_diffusion.files import read_adapter
from svft_diffusion.files.training_folder import ADAPTER_FILE
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.models import EMBEDDED_MODEL, hub_name
from svft_diffusion.settings import settings_of
from svft_diffusion.training.card import saved_settings
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.status import FAILED, FINISHED, STOPPED, TRAINING

RECORD_FILE = "subject.json"
WAITING = "waiting"
INTERRUPTED = "interrupted"  # goes on by itself with the next start
REFUSED = "refused"  # trained with other settings
__all__ = ["FAILED", "FINISHED", "INTERRUPTED", "REFUSED", "STOPPED", "TRAINING", "WAITING"]

# A row may go on with other values of these: its adapter is the same.
_WITHOUT_EFFECT = {
    "output_dir", "push_to_hub", "hub_model_id", "hub_private_repo", "report_to", "logging_dir", "checkpointing_steps",
    "checkpoints_total_limit", "history_steps", "check_result", "dataloader_num_workers", "local_files_only",
}  # fmt: skip
_PATHS = [item.name for item in settings_of(TrainingConfig) if item.kind is Path]


@dataclass
class Record:
    """How far a row is, and what it has cost."""

    settings: dict[str, Any]  # see `settings_of_row`
    state: str
    attempts: int = 0
    reason: str | None = None  # of a failure
    steps: int | None = None
    last_loss: float | None = None
    seconds: float = 0.0  # of all attempts
    preparation: float | None = None  # seconds before the first step, in the last attempt
    loading: float = 0.0  # seconds of `preparation` that loaded the base model
    sample: str | None = None  # the first of the last samples, inside the row's folder


def settings_of_row(config: TrainingConfig, origin: Path) -> dict[str, Any]:
    """The settings that the adapter follows from, as JSON holds them.

    Args:
        origin: the folder of the list; paths are told from there, so that all may be moved together.
    """
    defaults = saved_settings(TrainingConfig())  # left out, so that a version with more settings reads the same
    settings = {
        name: value
        for name, value in saved_settings(config).items()
        if name not in _WITHOUT_EFFECT and value != defaults.get(name)
    }
    for name in _PATHS:
        if name in settings:
            settings[name] = _from(origin, Path(str(settings[name])))
    base = config.pretrained_model_name_or_path
    if hub_name(base) is None and base != EMBEDDED_MODEL:
        settings["pretrained_model_name_or_path"] = _from(origin, Path(base).expanduser())
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _from(origin: Path, path: Path) -> str:
    try:
        return Path(os.path.relpath(path, origin)).as_posix()
    except ValueError:  # another drive of Windows
        return path.as_posix()


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """``max_train_steps was 4, is 6`` for the first setting that differs; None if all are the same."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            was, is_now = (repr(side[name]) if name in side else "the default" for side in (before, now))
            return f"{name} was {was}, is {is_now}"
    return None


def read_record(folder: Path) -> Record | None:
    """The record of a row; None where there is none, or none that can be read."""
    try:
        values = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        record = Record(**values)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return record if isinstance(record.settings, dict) and isinstance(record.attempts, int) else None


def write_record(folder: Path, record: Record) -> None:
    """Raises `UserError` if it can't be written."""
    with replace_when_whole(folder / RECORD_FILE) as unfinished:
        unfinished.write_text(json.dumps(dataclasses.asdict(record), indent=1) + "\n", encoding="utf-8")


def adapter_is_whole(folder: Path) -> bool:
    """Whether the adapter of a finished row is there, and holds what was written."""
    try:
        read_adapter(folder / ADAPTER_FILE)
    except UserError:
        return False
    return True


class Claims:
    """Who trains what, among all processes that share the output folder.

    A claim is a lock of the operating system on a file, so that it ends with the process that holds it, however that
    ends. It needs no messages between processes.
    """

    def __init__(self, output_dir: Path) -> None:
        self._folder = output_dir / ".claims"

    def claim(self, name: str) -> AcquireReturnProxy | None:
        """A claim on a row, to be entered and so left at the end, or None while another process has it.

        Raises:
            UserError: locks don't work here.
        """
        try:
            return self._lock(f"{name}.lock").acquire(timeout=0)
        except Timeout:
            return None
        except (OSError, NotImplementedError) as problem:
            raise UserError(f"can't lock files in {self._folder}: {problem}; use another --output_dir") from problem

    def claim_report(self) -> FileLock:
        """Entered, it waits until nobody else writes the files about all rows."""
        return self._lock(".report.lock")

    def is_free(self, name: str) -> bool:
        """Whether no process has a row at this moment."""
        claim = self.claim(name)
        if claim is None:
            return False
        with claim:
            return True

    def _lock(self, file_name: str) -> FileLock:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(f"can't write to {self._folder}: {problem.strerror or problem}") from problem
        return FileLock(self._folder / file_name)
