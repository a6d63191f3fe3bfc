"""The process of a training that the app starts: the command, and an eye on whether its end was asked for.

The app passes nothing on, for it may be gone when the first step is finished.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from svft_diffusion.app.jobs.job_folder import JobFolder
from svft_diffusion.cli.main import run_command

_SECONDS_BETWEEN_LOOKS = 0.2


def main(argv: Sequence[str]) -> int:
    """Run ``svft-diffusion train`` for the job in the folder that comes first, with the arguments after it; its exit
    code. Asked to stop, it ends after the step at hand, and not before the first."""
    job, *arguments = argv
    threading.Thread(target=_pass_on, args=(JobFolder(Path(job)),), daemon=True).start()
    return run_command("train", arguments)


def _pass_on(job: JobFolder) -> None:
    while not (job.stop_asked.exists() and job.has_finished_a_step()):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    job.stop_at_once()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
