"""Several runs in one class folder: they draw one after the other, and none takes away what another trains on.

The operating system holds the locks, so that those of a killed run are gone with it.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_DRAWING = "class_images.lock"
_IN_USE = "class_images.{}.used"
_SECONDS_BETWEEN_CALLS = 0.5
LOCK_FILE = re.compile(r"class_images\.(lock|[0-9a-f]+\.used)")


@contextlib.contextmanager
def drawing_alone(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """While entered, no other run decides on the pictures in ``folder`` or draws some.

    Args:
        on_wait: called again and again while another does; what it raises ends the waiting.

    Raises:
        OSError: files can't be locked there.
    """
    lock = FileLock(folder / _DRAWING)
    while True:
        try:
            lock.acquire(timeout=_SECONDS_BETWEEN_CALLS)
            break
        except Timeout:
            on_wait()
        except NotImplementedError as problem:
            raise OSError(f"no file locks there ({problem})") from problem
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """While entered, the drawn pictures in ``folder`` are needed."""
    file = folder / _IN_USE.format(secrets.token_hex(8))
    lock = FileLock(file)
    lock.acquire(timeout=0)
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # such as a folder that is gone
            file.unlink(missing_ok=True)


def is_in_use(folder: Path) -> bool:
    """Whether somebody needs the drawn pictures in ``folder``; to be asked while drawing alone."""
    for file in folder.glob(_IN_USE.format("*")):
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        file.unlink(missing_ok=True)  # of a run that was killed
    return False
