"""What tests of the app's trainings share: real runs on a tiny base, and processes that only play one."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from svft_diffusion.app.jobs import job_process
from svft_diffusion.app.jobs.training_jobs import Job, TrainingJobs
from svft_diffusion.training.config import TrainingConfig

ENDLESS = 1_000_000

# A run as the queue sees it, without the libraries that take seconds to load. It ends at its stop file, or as the name
# of its photos' prompt says; a slow one finishes no step.
PLAYED_RUN = """
import json, os, sys, time
from pathlib import Path
job, config = Path(sys.argv[2]), Path(sys.argv[4])
settings = dict(line.split(": ", 1) for line in config.read_text().splitlines() if ": " in line)
folder, prompt = Path(settings["output_dir"]), settings["instance_prompt"]
print(f"loading {folder}", flush=True)
if "refused" in prompt:
    print(f"error: can't read {folder / 'photo.png'}: no picture", file=sys.stderr)
    sys.exit(2)
folder.mkdir()
steps = 0 if "slow" in prompt else 1
status = {"state": "training", "step": steps, "total_steps": 9, "eta_seconds": 8.0, "pid": os.getpid()}
(folder / "status.json").write_text(json.dumps(status))
if steps:
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5, "smoothed_loss": 0.5}) + "\\n")
while not (folder / "stop").exists() and not (steps and (job / "stop-asked").exists()):
    time.sleep(0.02)
(folder / "stop").unlink(missing_ok=True)
(folder / "adapter.safetensors").write_bytes(b"")
(folder / "status.json").write_text(json.dumps(status | {"state": "stopped"}))
"""


def play_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs start `PLAYED_RUN` instead of the trainer."""
    monkeypatch.setattr(job_process, "PYTHON", (sys.executable, "-c", PLAYED_RUN))


def endless(config: TrainingConfig, prompt: str | None = None) -> TrainingConfig:
    """A run that ends when it is asked to."""
    return dataclasses.replace(
        config,
        max_train_steps=ENDLESS,
        checkpointing_steps=ENDLESS,
        history_steps=0,
        instance_prompt=prompt or config.instance_prompt,
    )


def wait(jobs: TrainingJobs, id: str, until: Callable[[Job], bool], seconds: float = 120.0) -> Job:
    """The job as soon as ``until`` holds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = jobs.get(id)
        if until(job):
            return job
        time.sleep(0.05)
    log = job.folder.log.read_text(encoding="utf-8") if job.folder.log.exists() else ""
    raise AssertionError(f"still {job}\n{log}")


def has_ended(job: Job) -> bool:
    """For `wait`."""
    return not job.is_active


def is_running(job: Job) -> bool:
    """For `wait`: it has finished a step."""
    return job.state == "running" and job.step > 0


def process_of(job: Job) -> psutil.Process:
    """What does the job."""
    return psutil.Process(json.loads((job.folder.path / "process.json").read_text())["pid"])


def end_all(jobs: TrainingJobs) -> None:
    """End what a test has left."""
    for job in jobs.jobs():  # those that wait come first, so that none of them is started instead
        if job.state == "queued":
            jobs.stop(job.id)
    for job in jobs.jobs():
        if job.state == "running":
            process_of(job).kill()


def photos_of(folder: Path) -> list[str]:
    """As the page gets them."""
    return [str(path) for path in sorted(folder.iterdir()) if path.suffix in (".png", ".txt")]
