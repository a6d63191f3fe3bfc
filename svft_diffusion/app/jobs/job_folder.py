"""The folder of one training, and what can be read from it: the page holds nothing of its own about a run."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from svft_diffusion.app.jobs.job_process import ProcessMark, is_running
from svft_diffusion.data.class_images import count_drawn
from svft_diffusion.errors import UserError
from svft_diffusion.files.training_folder import ADAPTER_FILE, METRICS_FILE
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.training.history import HistoryEntry, has_history, read_history, sample_files
from svft_diffusion.training.interruption import STOP_FILE
from svft_diffusion.training.metrics import read_metrics
from svft_diffusion.training.status import (
    DRAWING_CLASS_IMAGES,
    FAILED,
    FINISHED,
    STATUS_FILE,
    STOPPED,
    without_folders,
)

QUEUED, RUNNING = "queued", "running"
ENDED = (FINISHED, STOPPED, FAILED)

_JOB_FILE = "job.json"
_PROCESS_FILE = "process.json"
_STOP_ASKED_FILE = "stop-asked"
_LOG_FILE = "log.txt"
_MOST_POINTS = 200
_LOG_TAIL = 20_000  # bytes
_REASON_LENGTH = 300
_RECORDED_SECONDS = 10.0  # within which a start is recorded, even where the disk is slow
_UNKNOWN_REASON = (
    "the training's process ended without a word: it was killed, often because memory ran out; "
    "try a smaller base model or fewer photos at once, or start it again"
)
# The last words of a command, and of Python.
_ERROR = re.compile(r"error: (.+)|((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Diverged|Interrupt)\b.*)")


@contextlib.contextmanager
def alone(folder: Path, lock_file: str) -> Iterator[None]:
    """While entered, no other thread or process is in here with that lock in that folder, which is made for it.

    Raises:
        UserError: the folder can't be written.
    """
    lock = FileLock(folder / lock_file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(NotImplementedError):  # a file system without locks: the app alone may use it
            lock.acquire()
    except OSError as problem:
        raise UserError(f"can't write to the folder {folder.name}: {problem.strerror or problem}") from problem
    try:
        yield
    finally:
        lock.release()


class JobFolder:
    """Names in a job's folder.

    ``result`` is the output folder of the trainer, and its name what the library calls the adapter.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name
        self.result = path / path.name
        self.photos = path / "photos"
        self.config = path / "config.yaml"
        self.log = path / _LOG_FILE
        self.stop_asked = path / _STOP_ASKED_FILE

    @property
    def is_job(self) -> bool:
        """Whether a job has been put there whole."""
        return (self.path / _JOB_FILE).is_file()

    @property
    def was_started(self) -> bool:
        return (self.path / _PROCESS_FILE).is_file()

    def facts(self) -> dict[str, Any]:
        """What was said of the job when it was made."""
        return _read_json(self.path / _JOB_FILE)

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Make it a job. Raises `UserError` if that can't be written."""
        _write_json(self.path / _JOB_FILE, facts)

    def begin(self) -> None:
        """Say that it is being started, so that nobody starts it again."""
        _write_json(self.path / _PROCESS_FILE, {"begun": time.time()})

    def give_up(self) -> None:
        """Say that there could be no process."""
        _write_json(self.path / _PROCESS_FILE, {})

    def record(self, mark: ProcessMark) -> None:
        """Say which process does it."""
        _write_json(self.path / _PROCESS_FILE, {"pid": mark.pid, "started": mark.started})

    def pid(self) -> int | None:
        """The id of the process that does it, or did; None before it is known."""
        pid = _read_json(self.path / _PROCESS_FILE).get("pid")
        return None if pid is None else int(pid)

    def status(self) -> dict[str, Any]:
        """The trainer's ``status.json``; empty before there is one."""
        return _read_json(self.result / STATUS_FILE)

    def class_images(self) -> tuple[int, int] | None:
        """How many class images there are, and how many there shall be; None while none are drawn."""
        wanted = self.facts().get("class_images")
        if not isinstance(wanted, dict) or self.status().get("state") != DRAWING_CLASS_IMAGES:
            return None
        total = int(wanted["total"])
        return min(count_drawn(Path(wanted["folder"])), total), total

    def state(self) -> str:
        """`QUEUED`, `RUNNING`, or how it ended."""
        if not self.was_started:
            return QUEUED
        works = self._works()  # before the status is read: it says its end before it ends
        state = str(self.status().get("state", ""))
        if state in ENDED:
            return state
        return RUNNING if works else FAILED

    def is_busy(self) -> bool:
        """Whether its process is there, be it only to leave."""
        return self.was_started and self._works()

    def has_finished_a_step(self) -> bool:
        """Whether there is something to save."""
        return bool(read_metrics(self.result / METRICS_FILE))

    def stop_at_once(self) -> None:
        """Have the trainer end after what it is doing, be it before the first step."""
        with contextlib.suppress(OSError):  # it has no folder yet
            (self.result / STOP_FILE).touch()

    def forget_stop(self) -> None:
        """Remove a request that came too late."""
        (self.result / STOP_FILE).unlink(missing_ok=True)

    def _works(self) -> bool:
        process = _read_json(self.path / _PROCESS_FILE)
        if "pid" in process:
            return is_running(ProcessMark(int(process["pid"]), float(process["started"])))
        # Whoever started it is about to record it, or died in that moment; then the run itself says its id.
        begun, status = float(process.get("begun", 0.0)), self.status()
        if "pid" in status:
            return is_running(ProcessMark(int(status["pid"]), begun))
        return time.time() - begun < _RECORDED_SECONDS

    def reason(self) -> str:
        """Why it failed, without the folders in which files lie."""
        said = self.status().get("reason")
        return _short(str(said)) if said else _short(without_folders(self._last_error())) or _UNKNOWN_REASON

    def _last_error(self) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _LOG_TAIL))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""
        lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
        match = _ERROR.fullmatch(lines[-1]) if lines else None
        return (match[1] or match[2]) if match else ""


@dataclass(frozen=True)
class Job:
    """A training as it stands now.

    Attributes:
        state: queued, running, finished, stopped or failed.
        stage: while it runs, what it is doing: starting, drawing class images, encoding pictures, training, sampling,
            stopping.
        class_images: while they are drawn, how many there are, and how many there shall be.
        step: finished steps.
        total_steps: 0 while nobody knows.
        eta_seconds: of the steps that are left; None while nobody knows.
        reason: of a failure, in one line.
        queue_position: 1 for the next; None if it does not wait.
        stop_asked: whether somebody has asked for its end.
        prompt: of its samples.
        created: seconds since 1970.
    """

    id: str
    name: str
    base: str
    state: str
    stage: str
    class_images: tuple[int, int] | None
    step: int
    total_steps: int
    eta_seconds: float | None
    adapter: Path | None
    reason: str | None
    queue_position: int | None
    stop_asked: bool
    prompt: str
    created: float
    folder: JobFolder

    @property
    def is_active(self) -> bool:
        """Whether it runs or waits."""
        return self.state in (QUEUED, RUNNING)

    @cached_property
    def losses(self) -> list[tuple[int, float]]:
        """(step, smoothed loss), at most two hundred of them."""
        rows = read_metrics(self.folder.result / METRICS_FILE)
        every = -(-len(rows) // _MOST_POINTS) or 1
        kept = [row for number, row in enumerate(rows, start=1) if number % every == 0 or number == len(rows)]
        return [(int(row["step"]), float(row.get("smoothed_loss", row["loss"]))) for row in kept]

    @cached_property
    def samples(self) -> list[Path]:
        """The newest ones."""
        by_step = sample_files(self.folder.result)
        return by_step[max(by_step)] if by_step else []

    @cached_property
    def history(self) -> list[HistoryEntry]:
        """The adapters of the steps that were kept, and their samples; the result of a stopped run is one of them."""
        kept = read_history(self.folder.result) if has_history(self.folder.result) else []
        if self.adapter is not None and (not kept or kept[-1].step < self.step):
            loss = self.losses[-1][1] if self.losses else None
            kept.append(HistoryEntry(self.step, self.adapter, [], loss, None))
        return kept


def read_job(folder: JobFolder, queue_position: int | None = None) -> Job:
    """The job in ``folder``, as it stands."""
    facts, state = folder.facts(), folder.state()
    status = folder.status()
    adapter = folder.result / ADAPTER_FILE
    return Job(
        id=folder.id,
        name=str(facts.get("name", folder.id)),
        base=str(facts.get("base", "")),
        state=state,
        stage=str(status.get("state", "starting")) if state == RUNNING else "",
        class_images=folder.class_images() if state == RUNNING else None,
        step=int(status.get("step") or 0),
        total_steps=int(status.get("total_steps") or facts.get("total_steps") or 0),
        eta_seconds=status.get("eta_seconds") if state == RUNNING else None,
        adapter=adapter if state in ENDED and adapter.is_file() else None,
        reason=folder.reason() if state == FAILED else None,
        queue_position=queue_position if state == QUEUED else None,
        stop_asked=folder.stop_asked.exists(),
        prompt=str(facts.get("prompt") or ""),
        created=float(facts.get("created", 0.0)),
        folder=folder,
    )


def _short(text: str) -> str:
    return text if len(text) <= _REASON_LENGTH else f"{text[:_REASON_LENGTH]}..."


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet, or of a disk that is full
        return {}
    return values if isinstance(values, dict) else {}


def _write_json(file: Path, values: dict[str, Any]) -> None:
    with replace_when_whole(file) as unfinished:
        unfinished.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
