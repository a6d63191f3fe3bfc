"""Work in a thread of its own that hands out how far it is, and ends when nobody listens any more."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

Event = TypeVar("Event")

_LOOK_EVERY = 0.05  # seconds between two looks whether somebody still waits for a lock
_LONGEST_SILENCE = 0.2  # seconds; who listens can leave between two events only
_LONGEST_END = 10.0  # seconds that the end of the program waits


@dataclass(frozen=True)
class Waiting:
    """Nothing new: the work takes its time, and who listens can leave."""


class Cancelled(Exception):
    """Nobody listens any more."""


class Listener(Generic[Event]):
    """Where the work tells how far it is; both methods raise `Cancelled` when nobody listens any more."""

    def __init__(self) -> None:
        self._events: SimpleQueue[Event | _End] = SimpleQueue()
        self._gone = threading.Event()

    def tell(self, event: Event) -> None:
        """Hand out an event."""
        if self._gone.is_set():
            raise Cancelled
        self._events.put(event)

    @contextmanager
    def holding(self, lock: threading.Lock) -> Iterator[None]:
        """Within the context, the lock is held."""
        while not lock.acquire(timeout=_LOOK_EVERY):
            if self._gone.is_set():
                raise Cancelled
        try:
            if self._gone.is_set():
                raise Cancelled
            yield
        finally:
            lock.release()

    def _next(self) -> Event | Waiting | _End:
        try:
            return self._events.get(timeout=_LONGEST_SILENCE)
        except Empty:
            return Waiting()


class _End:
    def __init__(self, problem: BaseException | None = None) -> None:
        self.problem = problem


_running: dict[threading.Thread, Listener[Any]] = {}


def events_of(work: Callable[[Listener[Event]], None]) -> Generator[Event | Waiting, None, None]:
    """The events of ``work``, which starts with the first of them and raises here what it raises.

    Closing the iterator, which takes no time, ends the work when it next tells something. A listener who is slow does
    not hold the work up.
    """
    listener: Listener[Event] = Listener()

    def run() -> None:
        end = _End()
        try:
            work(listener)
        except BaseException as problem:  # raised where the events are read
            end = _End(problem)
        listener._events.put(end)
        _running.pop(thread, None)

    thread = threading.Thread(target=run, name="drawing", daemon=True)
    _running[thread] = listener
    thread.start()
    try:
        while not isinstance(event := listener._next(), _End):
            yield event
        if event.problem is not None:
            raise event.problem
    finally:
        listener._gone.set()


@atexit.register
def end_all() -> None:
    """End all work: Python must not end while a thread is in torch, which would abort the program."""
    running = dict(_running)
    for listener in running.values():
        listener._gone.set()
    for thread in running:
        thread.join(_LONGEST_END)
