"""``status.json`` in the output folder: what a run is doing now, for programs that look on.

It names no folder of the machine. A run that was killed leaves it as it was: ``pid`` and ``updated`` tell.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from svft_diffusion.errors import UserError
from svft_diffusion.files.whole_files import replace_when_whole

STATUS_FILE = "status.json"

STARTING = "starting"
DRAWING_CLASS_IMAGES = "drawing class images"
ENCODING_PICTURES = "encoding pictures"
TRAINING = "training"
SAMPLING = "sampling"
STOPPING = "stopping"
# How it ended:
STOPPED, FINISHED, FAILED = "stopped", "finished", "failed"

_SECONDS_BETWEEN_WRITES = 2.0
_SMOOTHING = 0.9  # of the seconds that a step takes
# A folder may have spaces in its name, but where a word with a dot ends, so does the name of a file.
_FOLDER = re.compile(r"(?:[A-Za-z]:[\\/]|(?<![\w.])[\\/]{1,2})(?:(?:[^\s:;,'\"()\\/.]+ +)*[^\s:;,'\"()\\/]+[\\/])+")


class RunStatus:
    """Keeps ``status.json`` up to date while entered, and says in the end how it ended.

    A run that is refused before it began leaves no folder behind that was not there before.

    Args:
        active: whether this process writes it; one of several does.
    """

    def __init__(self, output_dir: Path, *, active: bool = True) -> None:
        self._file = output_dir / STATUS_FILE
        self._active = active
        self._makes_folder = False
        self._written_at = -math.inf
        self._seconds_per_step = 0.0
        self._steps = 0  # of this start
        self._status: dict[str, Any] = {
            "state": STARTING,
            "step": None,
            "total_steps": None,
            "loss": None,  # smoothed
            "seconds_per_step": None,
            "eta_seconds": None,
            "reason": None,  # of a failure
            "pid": os.getpid(),
            "started": time.time(),  # like `updated`, seconds since 1970
        }

    def __enter__(self) -> RunStatus:
        self._makes_folder = self._active and not self._file.parent.exists()
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._makes_folder and self._status["state"] == STARTING and isinstance(error, UserError):
            with contextlib.suppress(OSError):  # others may have written there
                self._file.unlink()
                self._file.parent.rmdir()
            return
        self._status["eta_seconds"] = None
        if error is None:
            self._status["state"] = FINISHED
        elif isinstance(error, Exception):
            self._status |= {"state": FAILED, "reason": reason_in_one_line(error)}
        else:
            self._status["state"] = STOPPED
        self._write()

    def enter(self, state: str) -> None:
        """Say that the run is in ``state`` now; may be called as often as one likes."""
        changed = state != self._status["state"]
        self._status["state"] = state
        self._write_now_and_then(changed)

    def step_finished(self, step: int, total_steps: int, *, loss: float, seconds: float) -> None:
        """Say that ``step`` took ``seconds``. ``loss`` is the smoothed one."""
        # The first step of a start warms up, and is forgotten as soon as there is another.
        before = self._seconds_per_step if self._steps > 1 else seconds
        self._seconds_per_step = _SMOOTHING * before + (1 - _SMOOTHING) * seconds
        self._steps += 1
        self._status |= {
            "step": step,
            "total_steps": total_steps,
            "loss": loss if math.isfinite(loss) else None,
            "seconds_per_step": round(self._seconds_per_step, 4),
            "eta_seconds": round(self._seconds_per_step * (total_steps - step), 1),
        }
        self.enter(TRAINING)

    def _write_now_and_then(self, urgent: bool) -> None:
        if urgent or time.monotonic() - self._written_at >= _SECONDS_BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        if not self._active:
            return
        self._written_at = time.monotonic()
        text = json.dumps(self._status | {"updated": time.time()}, indent=1)
        # Looking on is not worth a run: a full disk ends it where something is lost.
        with contextlib.suppress(UserError), replace_when_whole(self._file, flush=False) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")


def reason_in_one_line(error: BaseException) -> str:
    """What went wrong, without the folders in which files lie."""
    text = " ".join(str(error).split())
    if not isinstance(error, UserError):
        text = f"{type(error).__name__}: {text}"
    return without_folders(text)


def without_folders(text: str) -> str:
    """``text`` with files named, but not where they lie."""
    return _FOLDER.sub("", text)
