"""Ending a run early without losing anything: by a signal, or by a file named ``stop`` in the output folder.

SIGINT (Ctrl-C), SIGTERM (what schedulers send first), SIGUSR1 (what they can be told to send before the time is up),
SIGHUP (a closed terminal) and Windows' SIGBREAK all mean the same: finish the running step, save, and exit with 128 and
the signal's number. The stop file does so too, and the exit code is 0, because nothing went wrong.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from svft_diffusion.errors import Interrupted

STOP_FILE = "stop"
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)
_NOT_ASKED = -1
# torchrun, told to stop by Ctrl-C, passes on what the terminal has sent to its processes already.
_SECONDS_OF_RELAYED_SIGNAL = 5.0


class Interruption:
    """While entered, signals and the stop file are requests that the run looks for; a second Ctrl-C ends it at once.

    Signals that were ignored before, as those of a program in the background are, stay so. Outside the main thread no
    signal can be received, and the stop file alone counts. Handlers that were there are back when this is left.

    Args:
        output_dir: where a stop file counts; None: nowhere.
        stop_asked: says True when somebody asks for an end in another way, which counts as the stop file does.
    """

    def __init__(self, output_dir: Path | None, stop_asked: Callable[[], bool] | None = None) -> None:
        self._stop_file = None if output_dir is None else output_dir / STOP_FILE
        self._stop_asked = stop_asked
        self._exit_code = _NOT_ASKED
        self._first_control_c: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):  # None: not of Python, which could not put it back
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        if isinstance(error, Interrupted) and error.exit_code == 0:
            self.forget_old_stop_file()

    def forget_old_stop_file(self) -> None:
        """A stop file that was there before the run began was meant for another one."""
        if self._stop_file is not None and self._stop_file.is_file():
            self._stop_file.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise `Interrupted` if this process was asked to end."""
        if self._asked() != _NOT_ASKED:
            raise Interrupted(self._exit_code)

    def check_together(self, accelerator: Accelerator) -> None:
        """Raise `Interrupted` in all processes if one of them was asked to end; all must call this after each step."""
        if accelerator.num_processes == 1:
            self.check()
            return
        asked = torch.tensor([self._asked()], device=accelerator.device)
        together = int(accelerator.gather(asked).max())
        # A request that came while the processes told each other is theirs at the next step, and stays till then.
        if together != _NOT_ASKED:
            raise Interrupted(together)

    def _asked(self) -> int:
        if self._exit_code == _NOT_ASKED and self._stop_file_found():
            self._exit_code = 0
        return self._exit_code

    def _stop_file_found(self) -> bool:
        if self._stop_file is not None and self._stop_file.is_file():
            return True
        return self._stop_asked is not None and self._stop_asked()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_control_c is None:
                self._first_control_c = now
            elif "TORCHELASTIC_RUN_ID" not in os.environ or now - self._first_control_c > _SECONDS_OF_RELAYED_SIGNAL:
                self._restore()
                raise KeyboardInterrupt
        if self._exit_code == _NOT_ASKED:
            self._exit_code = 128 + number

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
