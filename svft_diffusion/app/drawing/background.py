"""Work in a thread of its own that hands out how far it is, and ends when nobody listens any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Generic, TypeVar

Event = TypeVar("Event")

_LOOK_EVERY = 0.05  # seconds between two looks whether somebody still waits for a lock


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
            yield
        finally:
            lock.release()


class _End:
    def __init__(self, problem: BaseException | None = None) -> None:
        self.problem = problem


def events_of(work: Callable[[Listener[Event]], None]) -> Generator[Event, None, None]:
    """The events of ``work``, which starts with the first of them and raises here what it raises.

    Closing the iterator waits until the work has ended, which is when it next tells something. A listener who is slow
    does not hold the work up.
    """
    listener: Listener[Event] = Listener()

    def run() -> None:
        end = _End()
        try:
            work(listener)
        except BaseException as problem:  # raised where the events are read
            end = _End(problem)
        listener._events.put(end)

    thread = threading.Thread(target=run, name="drawing", daemon=True)
    thread.start()
    try:
        while not isinstance(event := listener._events.get(), _End):
            yield event
        if event.problem is not None:
            raise event.problem
    finally:
        listener._gone.set()
        thread.join()
