"""Pictures spread over processes that say nothing to each other, and computing that does not depend on their number.

``accelerate launch`` tells each process its number. Each of ``n`` draws every ``n``-th batch, and the first one then
waits for the others: each holds a lock in the output folder while it draws, which the operating system takes away when
a process ends, however that happens. What is missing then, the first draws itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from svft_diffusion.errors import UserError

_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


@dataclass(frozen=True)
class Process:
    """This one among those that were started together."""

    index: int = 0
    count: int = 1
    local_index: int = 0  # on this machine

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes what is about all pictures."""
        return self.index == 0


def this_process() -> Process:
    """What ``accelerate launch`` and ``torchrun`` told this process."""
    return Process(*(int(os.environ.get(name, default)) for name, default in _VARIABLES))


def device_of(process: Process, name: str) -> str:
    """``auto`` and ``cuda`` as the GPU of this process, where there are several; others stay as they are."""
    if name in ("auto", "cuda") and process.count > 1 and torch.cuda.device_count() > 1:
        return f"cuda:{process.local_index % torch.cuda.device_count()}"
    return name


@contextlib.contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """Within the context, torch computes on the CPU with ``count`` threads.

    Sums are split among threads, and so are rounding errors: pictures are the same to the byte if the number is.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def drawing(output_dir: Path, process: Process) -> Iterator[None]:
    """Within the context, `wait_for_others` of the first process waits for this one.

    Raises:
        UserError: files in the folder can't be locked.
    """
    with contextlib.nullcontext() if process.count == 1 else _lock(output_dir, process.index):
        yield


def wait_for_others(output_dir: Path, process: Process) -> None:
    """Wait until no other process draws."""
    for index in set(range(process.count)) - {process.index}:
        with _lock(output_dir, index):
            pass


@contextlib.contextmanager
def _lock(output_dir: Path, index: int) -> Iterator[None]:
    """Within the context, this process has the lock of number ``index``; nothing of it is left afterwards."""
    file = output_dir / f".drawing-{index}.lock"
    lock = FileLock(file)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as problem:
        raise UserError(f"can't lock files in {output_dir}: {problem}; use another --output_dir") from problem
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # Windows removes no file that another process has open
            file.unlink(missing_ok=True)
