"""The request to end all rows: a file named ``stop`` in the output folder."""

from __future__ import annotations

import secrets
from pathlib import Path

from svft_diffusion.errors import UserError
from svft_diffusion.training.interruption import STOP_FILE


class StopFile:
    """The file ``stop`` in the output folder of all rows, if it is made from now on.

    By the time of files in that folder, which may be another machine's.
    """

    def __init__(self, output_dir: Path) -> None:
        self._file = output_dir / STOP_FILE
        probe = output_dir / f".started-{secrets.token_hex(8)}"
        try:
            probe.touch()
            self._started = probe.stat().st_mtime_ns
            probe.unlink()
        except OSError as problem:
            raise UserError(f"can't write to {output_dir}: {problem.strerror or problem}") from problem

    def forget_old(self) -> None:
        """Remove one that was there before: it was meant for an earlier start."""
        if not self.asked():
            self._file.unlink(missing_ok=True)

    def asked(self) -> bool:
        """Whether somebody has made it since."""
        try:
            return self._file.stat().st_mtime_ns >= self._started
        except OSError:
            return False
