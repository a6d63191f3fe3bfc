"""Evaluations that the app has started: the command in a process of its own, one at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from svft_diffusion.app.jobs.evaluation_runs import Run
from svft_diffusion.app.jobs.job_folder import RUNNING, JobFolder, alone
from svft_diffusion.app.jobs.job_process import start_detached
from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.config import EvaluationConfig, check_config
from svft_diffusion.evaluation.report import REPORT_FILE
from svft_diffusion.sampling.numbered_folders import new_numbered_folder
from svft_diffusion.training.status import FAILED, FINISHED, STOPPED

_LOCK_FILE = ".evaluation.lock"
_LOG_TAIL = 4000  # bytes
_SECONDS_TO_END = 5.0
# A progress bar, as tqdm writes it: what it is at, and how far.
_BAR = re.compile(r"([^\r\n|]*?):?\s*\d+%\|[^|]*\|\s*(\d+)/(\d+) \[")


class EvaluationFolder(JobFolder):
    """Names in the folder of an evaluation: beside its report lies what is known of its process."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.result = path

    def state(self) -> str:
        """`RUNNING`, or how it ended."""
        if self.is_busy():
            return RUNNING
        if self.report_time() not in (None, self.facts().get("report_before")):
            return FINISHED
        return STOPPED if self.stop_asked.exists() else FAILED

    def report_time(self) -> int | None:
        """When the report was written; None: there is none."""
        try:
            return (self.path / REPORT_FILE).stat().st_mtime_ns
        except OSError:
            return None

    def progress(self) -> tuple[str, int, int]:
        """What it is doing, how many pictures or adapters are done, and of how many; no bar yet: of 0."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _LOG_TAIL))
                bars = _BAR.findall(file.read().decode("utf-8", errors="replace"))
        except OSError:
            bars = []
        stage, done, total = bars[-1] if bars else ("", "0", "0")
        return stage.strip(), int(done), int(total)


@dataclass(frozen=True)
class EvaluationJob:
    """An evaluation as it stands now.

    Attributes:
        run_id: of the run whose adapters it scores.
        name: of that run.
        state: running, finished, stopped or failed.
        stage: the adapter whose pictures are drawn, or ``scoring``; empty before there is one.
        done, total: pictures, or adapters to be scored; of 0 while nobody knows.
        reason: of a failure, in one line.
    """

    id: str
    run_id: str
    name: str
    state: str
    stage: str
    done: int
    total: int
    reason: str | None


class EvaluationJobs:
    """The jobs in ``folder``, in numbered folders, as those of the command."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._processes: list[Any] = []  # so that they leave no trace when they have ended

    def start(self, run: Run, config: EvaluationConfig) -> str:
        """Begin an evaluation of all adapters that a run has kept; its id.

        One with the same settings that has been stopped, or whose run has more steps by now, goes on.

        Raises:
            UserError: settings that can't work, another evaluation runs, or there can be no process.
        """
        config = dataclasses.replace(config, run=run.folder)
        check_config(config)
        arguments = _arguments(config)
        with alone(self._folder, _LOCK_FILE):
            folders = self._folders()
            for one in folders:
                if one.is_busy():
                    raise UserError(f"an evaluation of {one.facts().get('name')} runs already; wait for it, or stop it")
            known = (one for one in folders if one.facts().get("arguments") == arguments)
            folder = next(known, None) or EvaluationFolder(new_numbered_folder(self._folder))
            folder.path.mkdir(exist_ok=True)
            folder.log.unlink(missing_ok=True)
            folder.stop_asked.unlink(missing_ok=True)
            folder.write_facts(
                {
                    "run": run.id,
                    "name": run.name,
                    "arguments": arguments,
                    "report_before": folder.report_time(),
                    "created": time.time(),
                }
            )
            folder.begin()
            try:
                process, mark = start_detached([*arguments, "--output_dir", str(folder.path)], folder.log)
            except OSError as problem:
                folder.give_up()
                raise UserError(f"no process can be started: {problem.strerror or problem}") from problem
            folder.record(mark)
        self._processes = [one for one in self._processes if one.poll() is None] + [process]
        return folder.id

    def jobs(self) -> list[EvaluationJob]:
        """All of them, the latest first."""
        for process in self._processes:
            process.poll()
        return [_read(folder) for folder in self._folders()]

    def stop(self, id: str) -> None:
        """End one. What it has drawn is kept, and need not be drawn again.

        Raises:
            UserError: there is none of that id, or it has ended already.
        """
        with alone(self._folder, _LOCK_FILE):
            folder = next((one for one in self._folders() if one.id == id), None)
            pid = None if folder is None else folder.pid()
            if folder is None or pid is None or not folder.is_busy():
                raise UserError("this evaluation has ended already")
            folder.stop_asked.touch()
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                process.terminate()
                try:
                    process.wait(_SECONDS_TO_END)
                except psutil.TimeoutExpired:
                    process.kill()

    def _folders(self) -> list[EvaluationFolder]:
        if not self._folder.is_dir():
            return []
        found = [EvaluationFolder(path) for path in self._folder.iterdir() if path.name.isdecimal()]
        jobs = [folder for folder in found if folder.is_job and folder.was_started]
        return sorted(jobs, key=lambda folder: float(folder.facts().get("created", 0.0)), reverse=True)


def _read(folder: EvaluationFolder) -> EvaluationJob:
    facts, state = folder.facts(), folder.state()
    stage, done, total = folder.progress() if state == RUNNING else ("", 0, 0)
    return EvaluationJob(
        id=folder.id,
        run_id=str(facts.get("run", "")),
        name=str(facts.get("name", "")),
        state=state,
        stage=stage,
        done=done,
        total=total,
        reason=folder.reason() if state == FAILED else None,
    )


def _arguments(config: EvaluationConfig) -> list[str]:
    """The command line that asks for what differs from the defaults."""
    arguments = ["evaluate"]
    for one in dataclasses.fields(EvaluationConfig):
        value = getattr(config, one.name)
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        if value == default:
            continue
        if isinstance(value, bool):
            arguments.append(f"--{one.name}")
        else:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{one.name}", *map(str, values)]
    return arguments
