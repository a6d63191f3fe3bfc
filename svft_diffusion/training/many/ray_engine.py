"""Rows spread over the machines of a Ray cluster: as many workers as fit, each with its own loaded base model.

All of them read and write the same folders under the same paths, and claim rows there as other processes do.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svft_diffusion.errors import Interrupted, UserError
from svft_diffusion.terminal import printable
from svft_diffusion.training.interruption import STOP_FILE, Interruption
from svft_diffusion.training.many.listing import Row
from svft_diffusion.training.many.record import FAILED, FINISHED, INTERRUPTED, REFUSED, STOPPED
from svft_diffusion.training.many.report import Report
from svft_diffusion.training.many.stop_file import StopFile
from svft_diffusion.training.many.worker import Job, Worker
from svft_diffusion.training.status import reason_in_one_line

_SECONDS_BETWEEN_LOOKS = 1.0
_RETRIES = 1  # of a row whose worker died: the next goes on from its checkpoint


@dataclass(frozen=True)
class Outcome:
    """What a worker says of a row."""

    state: str | None  # None: another process has it
    messages: list[str]
    problem: str | None = None  # with the base model or the folders, for whichever row


class RowTrainer:
    """The actor: lives in a process of its own, somewhere in the cluster."""

    def __init__(self, job: Job, stop: StopFile, folder: str) -> None:
        os.chdir(folder)  # where relative paths start for the user
        self._job = job
        self._stop = stop
        self._messages: list[str] = []
        self._worker = Worker(job, say=self._messages.append, quiet=True)

    def ready(self) -> bool:
        """Answered once there is a process."""
        return True

    def train(self, index: int) -> Outcome:
        """Train one row."""
        self._messages.clear()
        try:
            state = self._worker.take(self._job.rows[index], self._stop.asked)
        except Interrupted:  # in Ray, an interruption ends the worker
            return Outcome(INTERRUPTED, list(self._messages))
        except UserError as problem:
            return Outcome(INTERRUPTED, list(self._messages), str(problem))
        return Outcome(state, list(self._messages))


def train_with_ray(job: Job, *, address: str | None, workers: int | None) -> Report:
    """`Worker.work` by a cluster.

    Args:
        address: of the cluster; None: that of the environment, else a new one on this machine.
        workers: rows at a time; None: one for each GPU, or where there is none for each machine.

    Raises:
        Interrupted, UserError: as of `Worker.work`; also if there is no Ray, or no such cluster.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs the package ray: pip install 'svft-diffusion[ray]'") from None
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as problem:
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise UserError(f"no Ray cluster at {where}: {' '.join(str(problem).split())}") from problem
    watch = Worker(job)
    try:
        stop = watch.stop_file()
        with Interruption(None, stop.asked) as interruption:
            _Driver(ray, watch, stop, interruption, workers).run()
    except BaseException as end:
        watch.report(STOPPED if isinstance(end, KeyboardInterrupt) else FAILED)
        raise
    finally:
        ray.shutdown()
    return watch.report(FINISHED)


class _Driver:
    """Hands a row to each actor that lives and has none, until all rows are settled.

    Actors for which no machine has room, since others use the cluster too, get no row.
    """

    def __init__(
        self, ray: Any, watch: Worker, stop: StopFile, interruption: Interruption, workers: int | None
    ) -> None:
        job = watch.job
        self._ray = ray
        self._job = job
        self._watch = watch
        self._stop = stop
        self._interruption = interruption
        self._queue = deque(range(len(job.rows)))
        self._at_work: dict[Any, tuple[Any, int]] = {}  # future -> actor and row
        number, resources = _share(ray, workers, len(job.rows))
        actor = ray.remote(RowTrainer).options(
            max_restarts=-1,
            max_task_retries=_RETRIES,
            scheduling_strategy="SPREAD",
            **resources,
        )
        actors = [actor.remote(job, stop, os.getcwd()) for _ in range(number)]
        self._starting = {started.ready.remote(): started for started in actors}  # future -> actor
        self._idle: list[Any] = []
        print(f"ray: {number} at a time, each with {', '.join(f'{name} {n:g}' for name, n in resources.items())}")

    def run(self) -> None:
        """Raises `Interrupted` after all actors have saved, or `UserError` for what is wrong with all rows."""
        try:
            while self._queue or self._at_work:
                self._interruption.check()
                while self._queue and self._idle:
                    actor, index = self._idle.pop(), self._queue.popleft()
                    self._at_work[actor.train.remote(index)] = (actor, index)
                self._hear()
        except BaseException:
            self._stop_all()
            raise

    def _hear(self) -> None:
        done, _ = self._ray.wait([*self._at_work, *self._starting], timeout=_SECONDS_BETWEEN_LOOKS)
        for future in done:
            if future in self._starting:
                self._welcome(future)
                continue
            actor, index = self._at_work.pop(future)
            row = self._job.rows[index]
            self._idle.append(actor)
            outcome = self._outcome(future, row)
            for message in outcome.messages:
                print(printable(message), flush=True)
            if outcome.problem is not None:
                raise UserError(outcome.problem)
            if outcome.state is None:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                self._queue.append(index)
            if outcome.state == INTERRUPTED:
                self._interruption.check()  # by the stop file
                self._queue.append(index)  # somebody else ended that worker
            if self._job.stop_on_error and outcome.state in (FAILED, REFUSED):
                self._queue.clear()

    def _welcome(self, future: Any) -> None:
        actor = self._starting.pop(future)
        try:
            self._ray.get(future)
        except self._ray.exceptions.RayError as problem:
            if not (self._starting or self._idle or self._at_work):
                raise UserError(f"no worker of Ray could start: {' '.join(str(problem).split())}") from problem
        else:
            self._idle.append(actor)

    def _outcome(self, future: Any, row: Row) -> Outcome:
        try:
            outcome: Outcome = self._ray.get(future)
        except self._ray.exceptions.RayError as problem:
            if isinstance(problem, self._ray.exceptions.RayTaskError):
                reason = reason_in_one_line(problem.cause)
            else:
                reason = f"its worker died again and again ({type(problem).__name__})"
            self._watch.give_up(row, reason)
            return Outcome(FAILED, [f"{row}: {FAILED}: {reason}"])
        return outcome

    def _stop_all(self) -> None:
        """Let every actor save what it trains; their processes are not sent the terminal's signals."""
        if not self._at_work:
            return
        file = Path(self._job.output_dir) / STOP_FILE
        asked_by_user = file.exists()
        file.touch()
        self._ray.wait(list(self._at_work), num_returns=len(self._at_work), timeout=None)
        if not asked_by_user:
            file.unlink(missing_ok=True)


def _share(ray: Any, workers: int | None, rows: int) -> tuple[int, dict[str, float]]:
    """How many actors, and what each gets of a machine."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    number = min(rows, workers or gpus or len(nodes))
    on_a_node = -(-number // len(nodes))
    cpus = min(node.get("CPU", 1.0) for node in nodes) / on_a_node
    resources: dict[str, float] = {"num_cpus": int(cpus) if cpus >= 1 else math.floor(100 * cpus) / 100}
    if gpus:
        on_a_gpu = -(-number // gpus)  # no worker has parts of two
        resources["num_gpus"] = math.floor(100 / on_a_gpu) / 100
    return number, resources
