"""One process at work on the rows: it takes one after another that nobody else has, until all are settled."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from svft_diffusion.errors import Interrupted, UserError
from svft_diffusion.files.training_folder import METRICS_FILE
from svft_diffusion.training.checkpoints import existing_checkpoints, remove_leftovers
from svft_diffusion.training.checks import check, check_nothing_is_overwritten
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.interruption import Interruption
from svft_diffusion.training.many.folders import SharedFolders
from svft_diffusion.training.many.listing import Row
from svft_diffusion.training.many.record import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    REFUSED,
    STOPPED,
    TRAINING,
    WAITING,
    Claims,
    Record,
    adapter_is_whole,
    difference,
    read_record,
    settings_of_row,
    write_record,
)
from svft_diffusion.training.many.report import Report, make_report, write_report, write_status
from svft_diffusion.training.many.shared_base import BaseUnavailable, SharedBase
from svft_diffusion.training.many.stop_file import StopFile
from svft_diffusion.training.metrics import read_metrics
from svft_diffusion.training.status import reason_in_one_line
from svft_diffusion.training.trainer import StepReport, train

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_TRIES = 0.02
_LONGEST_LOOK = 10.0  # seconds, at a row whose photos are many
_SETTLED = (FINISHED, FAILED, STOPPED, REFUSED)


@dataclass(frozen=True)
class Job:
    """What all processes work on."""

    rows: list[Row]
    output_dir: Path
    origin: Path  # the folder of the list
    stop_on_error: bool = False


class Worker:
    """Trains rows of a job in this process.

    Args:
        say: tells the user one line.
        quiet: keep what the runs themselves print; for all but one of several processes.
    """

    def __init__(self, job: Job, *, say: Callable[[str], None] = print, quiet: bool = False) -> None:
        self.job = job
        self._say = say
        self._quiet = quiet
        self._base = SharedBase()
        self._claims = Claims(job.output_dir)
        self._whole: set[str] = set()  # rows whose finished adapters were read
        self._blocked: dict[str, str] = {}  # rows whose folders hold something else
        self._began, self._clock = time.time(), time.perf_counter()
        self._attempts = {row.name: _attempts(read_record(row.config.output_dir)) for row in job.rows}

    def check_rows(self) -> list[str]:
        """A line for each row that can't be trained as it stands; of those that are still to be trained.

        What other processes train now, they have checked.
        """
        problems = []
        folders = SharedFolders()
        for row in self.job.rows:
            there = row.config.output_dir.exists()
            claim = self._claim_to_check(row) if there else contextlib.nullcontext()
            if claim is None:
                continue
            with claim:
                state, _, record = self.state_of(row)
                if state in (FINISHED, REFUSED):
                    continue
                try:
                    config = self._ready(row, record)
                    folders.add(row, config, check(config))
                except UserError as problem:
                    problems.append(f"{row}: {problem}")
        return problems + folders.problems()

    def _claim_to_check(self, row: Row) -> AbstractContextManager[object] | None:
        """A claim; None if another process trains the row, rather than looking at it for a moment as this one does."""
        deadline = time.monotonic() + _LONGEST_LOOK
        while (claim := self._claims.claim(row.name)) is None:
            record = read_record(row.config.output_dir)
            if (record is not None and record.state == TRAINING) or time.monotonic() > deadline:
                return None
            time.sleep(_SECONDS_BETWEEN_TRIES)
        return claim

    def state_of(self, row: Row) -> tuple[str, str | None, Record | None]:
        """State, its reason, and the record. Rows that failed in an earlier start wait to be tried again."""
        record = read_record(row.config.output_dir)
        if row.name in self._blocked:
            return FAILED, self._blocked[row.name], None
        if record is None:
            return WAITING, None, None
        changed = difference(record.settings, settings_of_row(row.config, self.job.origin))
        if changed is not None:
            folder = row.config.output_dir
            reason = (
                f"it was trained with other settings ({changed}): give it those or another name, or move {folder} away"
            )
            return REFUSED, reason, record
        if record.state == FINISHED and row.name not in self._whole:
            if not adapter_is_whole(row.config.output_dir):
                return WAITING, "its adapter is missing or damaged", record
            self._whole.add(row.name)
        if record.state in (FAILED, STOPPED) and record.attempts <= self._attempts[row.name]:
            return WAITING, None, record
        return record.state, record.reason, record

    def work(self) -> Report:
        """Train what is to be trained, wait for what others train, and report.

        Raises:
            Interrupted: somebody asked for an end; the running row is saved.
            UserError: the base model can't be loaded, or the output folder can't be written.
        """
        stop = self.stop_file()
        try:
            with Interruption(None, stop.asked) as interruption:
                self._work(interruption, stop)
        except BaseException as end:
            self.report(STOPPED if isinstance(end, KeyboardInterrupt) else FAILED)
            raise
        return self.report(FINISHED)

    def stop_file(self) -> StopFile:
        """Requests to end from now on. Older ones go, but for those that other processes may be yet to see."""
        stop = StopFile(self.job.output_dir)
        if all(self._claims.is_free(row.name) for row in self.job.rows):
            stop.forget_old()
        return stop

    def _work(self, interruption: Interruption, stop: StopFile) -> None:
        waiting = self.job.rows
        while waiting:
            others: list[Row] = []
            for row in waiting:
                interruption.check()
                state = self.take(row, stop.asked)
                if state is None:
                    others.append(row)
                if self.job.stop_on_error and (state in (FAILED, REFUSED) or self._some_row_failed()):
                    self._say("the other rows are left as they are, because of --stop_on_error")
                    return
            waiting = others
            if waiting:
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _some_row_failed(self) -> bool:
        """Whether one failed since this start, in this process or another."""
        return any(self.state_of(row)[0] == FAILED for row in self.job.rows)

    def take(self, row: Row, stop_asked: Callable[[], bool]) -> str | None:
        """The row's state, after training it if that is what it waits for; None while another process trains it.

        Raises:
            Interrupted, UserError: see `work`.
        """
        claim = self._claims.claim(row.name)
        if claim is None:
            return None
        with claim:
            state, reason, record = self.state_of(row)
            if state in _SETTLED:
                self._say(f"{row}: {state}{f': {reason}' if reason else ''}")
                return state
            return self._train(row, record, stop_asked)

    def _train(self, row: Row, record: Record | None, stop_asked: Callable[[], bool]) -> str:
        """Train a row that this process has claimed."""
        try:
            config = self._ready(row, record)
        except UserError as problem:  # since the check; there is no record, lest the folder be taken for the row's
            self._blocked[row.name] = str(problem)
            self._say(f"{row}: {FAILED}: {problem}")
            return FAILED
        begun, loading = time.perf_counter(), self._base.seconds
        settings = settings_of_row(row.config, self.job.origin)
        new = Record(settings, TRAINING, _attempts(record) + 1, seconds=record.seconds if record else 0.0)

        def on_step(report: StepReport) -> None:
            if new.preparation is None:
                new.preparation = round(time.perf_counter() - begun - report.seconds, 4)
                new.loading = round(self._base.seconds - loading, 4)

        def close(state: str) -> None:
            new.state = state
            new.seconds = round(new.seconds + time.perf_counter() - begun, 4)
            metrics = read_metrics(row.config.output_dir / METRICS_FILE)
            if metrics:
                new.steps, new.last_loss = metrics[-1]["step"], metrics[-1]["loss"]
            write_record(row.config.output_dir, new)

        self._say(f"{row} of {len(self.job.rows)}: begins")
        try:
            write_record(row.config.output_dir, new)
            self._write_status(TRAINING)
            with self._output():
                result = train(config, on_step=on_step, load=self._base.lend, stop_asked=stop_asked)
            if result.samples:
                new.sample = result.samples[0].relative_to(config.output_dir).as_posix()
            state = FINISHED
        except Interrupted as request:
            if request.exit_code != 0 or stop_asked():
                close(INTERRUPTED)
                raise
            state = STOPPED  # by a stop file in its own folder
        except (BaseUnavailable, KeyboardInterrupt):
            close(INTERRUPTED)
            raise
        except Exception as error:
            state, new.reason = FAILED, reason_in_one_line(error)
            if not isinstance(error, UserError):
                traceback.print_exc()
        if not self._base.take_back():
            state, new.reason = FAILED, "training changed weights of the base model, which must never be"
        close(state)
        loss = f", loss {new.last_loss:.4f}" if new.last_loss is not None else ""
        self._say(f"{row}: {state}{f': {new.reason}' if new.reason else f' after {new.seconds:.1f} s{loss}'}")
        self._write_status(TRAINING)
        return state

    def give_up(self, row: Row, reason: str) -> None:
        """Note that a row failed with the process that trained it, or could not even begin."""
        claim = self._claims.claim(row.name)
        if claim is None:
            return
        with claim:
            record = read_record(row.config.output_dir)
            if record is not None and record.state == TRAINING:
                record.state, record.reason = FAILED, reason
                write_record(row.config.output_dir, record)
            elif record is None or record.state != FINISHED:
                self._blocked[row.name] = reason

    def report(self, state: str) -> Report:
        """Write the report and the status; ``state`` is that of the whole command."""
        rows = [(row, *self._shown(row)) for row in self.job.rows]
        report = make_report(rows, seconds=time.perf_counter() - self._clock)
        with self._claims.claim_report():
            write_report(report, self.job.output_dir)
            write_status(
                self.job.output_dir, [(row.name, shown) for row, shown, _, _ in rows], state=state, started=self._began
            )
        return report

    def _write_status(self, state: str) -> None:
        states = [(row.name, self._shown(row)[0]) for row in self.job.rows]
        write_status(self.job.output_dir, states, state=state, started=self._began)

    def _shown(self, row: Row) -> tuple[str, str | None, Record | None]:
        """`state_of`, where a row that was in training when its process was killed is told from one in training."""
        state, reason, record = self.state_of(row)
        if state == TRAINING and self._claims.is_free(row.name):
            return INTERRUPTED, reason, record
        return state, reason, record

    def _ready(self, row: Row, record: Record | None) -> TrainingConfig:
        """The settings of the run: from the row's newest checkpoint, if it has one.

        Raises:
            UserError: its folder holds what no row of this command has made.
        """
        folder = row.config.output_dir
        remove_leftovers(folder)
        checkpoints = existing_checkpoints(folder)
        if record is not None:
            return replace(row.config, resume_from_checkpoint="latest" if checkpoints else None)
        if checkpoints:
            raise UserError(
                f"{folder} holds checkpoints of another command; move it away, or give the row another name"
            )
        check_nothing_is_overwritten(row.config)
        return row.config

    @contextlib.contextmanager
    def _output(self) -> Iterator[None]:
        """Where what a run prints goes."""
        if not self._quiet:
            yield
            return
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),  # where the bars are drawn
        ):
            yield


def _attempts(record: Record | None) -> int:
    return 0 if record is None else record.attempts
