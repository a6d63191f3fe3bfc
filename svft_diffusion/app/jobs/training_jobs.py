"""Trainings that the app has started: each a process of its own, one at a time, the others in a queue on disk.

Everything is read from the folder anew, so that every page, and every app on that folder, sees the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import threading
import time
import unicodedata
from pathlib import Path
from typing import Any

from svft_diffusion.app.jobs.job_folder import ENDED, QUEUED, RUNNING, Job, JobFolder, alone, read_job
from svft_diffusion.app.jobs.job_process import TRAINING, start_detached
from svft_diffusion.data.captions import METADATA_FILE
from svft_diffusion.data.dataset import mask_file
from svft_diffusion.data.photos import scan_photos
from svft_diffusion.errors import UserError
from svft_diffusion.models.loading import EMBEDDED_MODEL, hub_name
from svft_diffusion.training.card import write_config
from svft_diffusion.training.checks import check
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.status import without_folders

__all__ = ["Job", "TrainingJobs"]

MOST_QUEUED = 20
_LONGEST_NAME = 60
_LOCK_FILE = ".queue.lock"
_CLASS_IMAGES_FOLDER = ".class-images"
_JOB_ID = re.compile(r"[a-z0-9][a-z0-9-]*-[0-9]+")
_SECONDS_BETWEEN_LOOKS = 0.5
# What `config.yaml` does not hold, because it belongs to this machine.
_CACHE_SETTINGS = ("factor_cache", "factor_cache_size", "encoding_cache", "encoding_cache_size")

_CLASS_IMAGE_SETTINGS = (
    "pretrained_model_name_or_path", "class_prompt", "seed", "resolution", "prior_generation_num_inference_steps",
    "prior_generation_guidance_scale", "prior_generation_precision",
)  # fmt: skip


class TrainingJobs:
    """The jobs below ``folder``, each in a folder of its own; see `JobFolder`."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        """
        Args:
            device: what trainings that are put into the queue here compute on, as `resolve_device` calls it.
        """
        self._folder = folder.absolute()
        self._device = device
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended: set[tuple[str, float | None]] = set()  # what has ended stays so
        self._wake = threading.Event()
        self._thread_lock = threading.Lock()
        self._watcher: threading.Thread | None = None

    def start(self, config: TrainingConfig, name: str) -> str:
        """Put a training into the queue, which starts it at once if nothing runs; its id.

        The photos of ``config.instance_data_dir`` are copied into the job's folder, with captions and masks; its
        output folder, and that of the class images if none is named, are chosen here.

        Raises:
            UserError: settings or photos that can't work, a name that is empty or too long, or a full queue.
        """
        shown = " ".join(name.split())
        if not shown or len(shown) > _LONGEST_NAME:
            raise UserError(f"give the training a name of at most {_LONGEST_NAME} characters")
        self._check_queue()
        job = self._new_folder(shown)
        try:
            try:
                config = self._placed(config, job)
                check(config)
                write_config(config, job.config)
            except UserError as problem:  # where the server keeps photos is not for visitors
                raise UserError(without_folders(str(problem))) from problem
            caches = {name: getattr(config, name) for name in _CACHE_SETTINGS}
            with alone(self._folder, _LOCK_FILE):
                self._check_queue()
                job.write_facts(
                    {
                        "name": shown,
                        "base": config.pretrained_model_name_or_path,
                        "total_steps": config.max_train_steps,
                        "prompt": config.instance_prompt,
                        "class_images": _wanted_class_images(config),
                        "device": self._device,
                        "caches": {name: str(value) for name, value in caches.items() if value is not None},
                        "created": time.time(),
                    }
                )
        except BaseException:
            shutil.rmtree(job.path, ignore_errors=True)
            raise
        self._advance()
        self._watch()
        return job.id

    def jobs(self) -> list[Job]:
        """All jobs, the latest first."""
        folders = self._folders()
        waiting = [folder.id for folder in folders if not folder.was_started]
        jobs = [read_job(folder, waiting.index(folder.id) + 1 if folder.id in waiting else None) for folder in folders]
        if any(job.is_active for job in jobs):
            self._watch()
        return jobs[::-1]

    def get(self, id: str) -> Job:
        """One of them. Raises `UserError` if there is none of that id."""
        for job in self.jobs() if _JOB_ID.fullmatch(id) else []:
            if job.id == id:
                return job
        raise UserError("this training is no longer there; choose another from the list")

    def stop(self, id: str) -> None:
        """Ask a run to end with all saved; one that waits leaves the queue for good.

        A run that has not finished its first step has no adapter yet, and ends after that step. Asked a second time,
        it ends at once, without one.

        Raises:
            UserError: there is no such job, or it has ended already.
        """
        with alone(self._folder, _LOCK_FILE):
            job = self.get(id)
            if job.state == QUEUED:
                shutil.rmtree(job.folder.path, ignore_errors=True)
                return
            if job.state != RUNNING:
                raise UserError(f"this training has {job.state} already")
            if job.stop_asked:
                job.folder.stop_at_once()
            job.folder.stop_asked.touch()

    def delete(self, id: str, created: float) -> None:
        """Remove all that is there of a job that has ended, for good: photos, settings, samples and its adapters.

        Args:
            created: when the one that is meant was; an id is given again once its job is gone.

        Raises:
            UserError: there is no such job, it has not ended, or it can't be removed.
        """
        with alone(self._folder, _LOCK_FILE):
            job = self.get(id)
            if job.created != created:
                raise UserError("this training is gone, and another one has its name; choose from the list")
            if job.is_active or job.folder.is_busy():
                raise UserError("this training has not ended; stop it first")
            gone = job.folder.path.with_name(f".deleted-{job.id}-{time.time_ns()}")
            try:
                job.folder.path.rename(gone)  # all or nothing
                shutil.rmtree(gone)
            except OSError as problem:
                raise UserError(f"the training can't be removed whole: {problem.strerror or problem}") from problem

    def _folders(self) -> list[JobFolder]:
        """First come, first served."""
        if not self._folder.is_dir():
            return []
        found = (JobFolder(path) for path in self._folder.iterdir() if _JOB_ID.fullmatch(path.name))
        return sorted(
            (folder for folder in found if folder.is_job),
            key=lambda folder: (float(folder.facts().get("created", 0.0)), folder.id),
        )

    def _check_queue(self) -> None:
        if sum(not folder.was_started for folder in self._folders()) >= MOST_QUEUED:
            raise UserError(f"{MOST_QUEUED} trainings wait already; remove one, or wait until one has started")

    def _new_folder(self, name: str) -> JobFolder:
        letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
        stem = re.sub(r"[^a-z0-9]+", "-", letters).strip("-")[:40].strip("-") or "training"
        number = 1
        while True:
            try:
                path = self._folder / f"{stem}-{number}"
                path.mkdir(parents=True)
                return JobFolder(path)
            except FileExistsError:
                number += 1
            except OSError as problem:
                raise UserError(f"can't make a folder for the training: {problem.strerror or problem}") from problem

    def _placed(self, config: TrainingConfig, job: JobFolder) -> TrainingConfig:
        """The settings with all that is read and written in its place. The process may have another current folder."""
        base = config.pretrained_model_name_or_path
        config = dataclasses.replace(
            config,
            output_dir=job.result,
            pretrained_model_name_or_path=base if hub_name(base) or base == EMBEDDED_MODEL else _absolute(base),
            base_config=config.base_config and config.base_config.expanduser().absolute(),
        )
        if config.instance_data_dir is not None:
            _copy_photos(config.instance_data_dir, job.photos)
            config = dataclasses.replace(config, instance_data_dir=job.photos)
        if config.class_prompts_file is not None:
            prompts = job.path / "class_prompts.txt"
            shutil.copyfile(config.class_prompts_file, prompts)
            config = dataclasses.replace(config, class_prompts_file=prompts)
        if _needs_class_images(config) and config.class_data_dir is None:
            folder = self._folder / _CLASS_IMAGES_FOLDER / _recipe_of_class_images(config)
            config = dataclasses.replace(config, class_data_dir=folder)
        return config

    def _watch(self) -> None:
        """See to it that the queue moves on also while nobody looks at the page."""
        self._wake.set()
        with self._thread_lock:
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._look_on, name="training-queue", daemon=True)
                self._watcher.start()

    def _look_on(self) -> None:
        while self._wake.wait():
            self._wake.clear()
            try:
                if self._advance():
                    self._wake.set()
            except (OSError, UserError):  # such as a full disk: what is due stays due
                self._wake.set()
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _advance(self) -> bool:
        """Start the next job if none is at work; whether there is more to come."""
        if not self._folder.is_dir():
            return False
        with alone(self._folder, _LOCK_FILE):
            self._processes = [process for process in self._processes if process.poll() is None]
            waiting, busy = [], False
            for folder in self._folders():
                known = folder.id, folder.facts().get("created")
                if known in self._ended:
                    continue
                if not folder.was_started:
                    waiting.append(folder)
                elif folder.is_busy():
                    busy = True
                elif folder.state() in ENDED:
                    folder.forget_stop()
                    self._ended.add(known)
            if waiting and not busy:
                self._start(waiting[0])
        return bool(waiting) or busy

    def _start(self, job: JobFolder) -> None:
        arguments = [str(job.path), "--config", str(job.config)]
        for name, value in job.facts().get("caches", {}).items():
            arguments += [f"--{name}", value]
        job.begin()
        try:
            process, mark = start_detached(
                arguments, job.log, module=TRAINING, device=str(job.facts().get("device", "auto"))
            )
        except OSError as problem:
            with contextlib.suppress(OSError):  # which may be the reason
                job.log.write_text(
                    f"error: no process can be started: {problem.strerror or problem}\n", encoding="utf-8"
                )
            job.give_up()
            return
        job.record(mark)
        self._processes.append(process)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _copy_photos(folder: Path, target: Path) -> None:
    """The usable photos with their captions and masks."""
    target.mkdir()
    for photo in scan_photos(folder).photos:
        for file in (photo, photo.with_suffix(".txt"), mask_file(photo)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    if (folder / METADATA_FILE).is_file():
        shutil.copyfile(folder / METADATA_FILE, target / METADATA_FILE)


def _needs_class_images(config: TrainingConfig) -> bool:
    return config.with_prior_preservation and config.prior_source == "images"


def _wanted_class_images(config: TrainingConfig) -> dict[str, Any] | None:
    """Where they are drawn, and how many there shall be."""
    if not _needs_class_images(config):
        return None
    return {"folder": str(config.class_data_dir), "total": config.num_class_images}


def _recipe_of_class_images(config: TrainingConfig) -> str:
    """A name for the folder that trainings of the same class share, so that they don't draw it anew for each other."""
    settings = {name: str(getattr(config, name)) for name in _CLASS_IMAGE_SETTINGS}
    if config.class_prompts_file is not None:
        settings["prompts"] = config.class_prompts_file.read_text(encoding="utf-8")
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
