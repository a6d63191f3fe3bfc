"""Processes of trainings: they belong to no terminal and to no app, and are known by their id and their start."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import svft_diffusion

# Of the same process, as read at different times: it is counted from the start of the machine, whose time of day may
# be corrected. Ids come round again much later.
_TOLERANCE_SECONDS = 5.0

PYTHON = (sys.executable, "-P", "-m")
"""With -P, modules come from where this program has its own, not from the current folder."""
COMMAND, TRAINING = "svft_diffusion", "svft_diffusion.cli.app_training"


@dataclass(frozen=True)
class ProcessMark:
    """A process that has been started. An id alone may be another's by now."""

    pid: int
    started: float  # seconds since 1970


def start_detached(
    arguments: Sequence[str], log: Path, *, module: str = COMMAND, device: str = "auto"
) -> tuple[subprocess.Popen[bytes], ProcessMark]:
    """Start a module of this program with ``arguments``: neither Ctrl-C nor the end of this process reaches it.

    Args:
        device: what a training computes on, as `resolve_device` calls it; other commands have a flag for that.

    Raises:
        OSError: there can be no such process, or the log can't be written.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*PYTHON, module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(device),
            **_detached(),
        )
    started = time.time()
    with contextlib.suppress(psutil.Error):  # it has ended already
        started = psutil.Process(process.pid).create_time()
    return process, ProcessMark(process.pid, started)


def run_to_the_end(
    arguments: Sequence[str], *, seconds: float, device: str = "auto"
) -> subprocess.CompletedProcess[str]:
    """``svft-diffusion`` with ``arguments``, waited for; its output as text. ``device`` is that of `start_detached`.

    Raises:
        subprocess.TimeoutExpired: it was ended after so many seconds.
        OSError: there can be no such process.
    """
    return subprocess.run(
        [*PYTHON, COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=_environment(device),
        timeout=seconds,
    )


def is_running(mark: ProcessMark) -> bool:
    """Whether that very process is at work still; one that has ended and waits for its parent's notice is not."""
    try:
        process = psutil.Process(mark.pid)
        same = abs(process.create_time() - mark.started) <= _TOLERANCE_SECONDS
        return same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # another user's, which it may not look into
        return False


def _environment(device: str) -> dict[str, str]:
    paths = [str(Path(svft_diffusion.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    added = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONIOENCODING": "utf-8"}
    kind, _, number = device.partition(":")
    if kind == "cpu":
        added["ACCELERATE_USE_CPU"] = "true"
    elif kind == "cuda" and number.isdecimal():
        visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        added["CUDA_VISIBLE_DEVICES"] = visible[int(number)] if int(number) < len(visible) else number
    return os.environ | added


def _detached() -> dict[str, Any]:
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS}
    return {"start_new_session": True}
