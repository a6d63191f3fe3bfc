"""Trainings that the app starts: processes of their own, and a queue on disk that any app on the folder serves."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from training_jobs import end_all, endless, has_ended, is_running, play_runs, process_of, wait
from training_runs import short_run

from svft_diffusion.app.components.training_view import status_html
from svft_diffusion.app.jobs import training_jobs
from svft_diffusion.app.jobs.job_folder import JobFolder
from svft_diffusion.app.jobs.job_process import ProcessMark
from svft_diffusion.app.jobs.job_process import is_running as process_runs
from svft_diffusion.app.jobs.training_jobs import Job, TrainingJobs
from svft_diffusion.cli import app_training
from svft_diffusion.errors import UserError
from svft_diffusion.files import read_adapter
from svft_diffusion.structured_files import read_structured
from svft_diffusion.training.card import write_config
from svft_diffusion.training.config import TrainingConfig


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """Four steps on a tiny base model."""
    return short_run(tmp_path_factory.mktemp("short"))


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[TrainingJobs]:
    """An empty queue; what a test leaves running is ended."""
    found = TrainingJobs(tmp_path / "training")
    yield found
    end_all(found)


def stop_at_a_random_moment(jobs: TrainingJobs, config: TrainingConfig, seed: int) -> Job:
    """The job, ended: between its start and some steps later."""
    id = jobs.start(endless(config), f"run {seed}")
    draw = random.Random(seed)
    if draw.random() < 0.8:  # else while it loads
        wait(jobs, id, is_running)
    time.sleep(draw.uniform(0, 2))
    jobs.stop(id)
    return wait(jobs, id, has_ended)


def assert_stopped_with_all_saved(jobs: TrainingJobs, job: Job) -> None:
    assert (job.state, job.reason) == ("stopped", None)
    assert job.step > 0 and job.adapter is not None
    read_adapter(job.adapter)
    assert [entry.step for entry in job.history][-1] == job.step
    wait(jobs, job.id, lambda job: not (job.folder.is_busy() or (job.folder.result / "stop").exists()), seconds=20)


def test_a_job_trains_in_a_process_of_its_own(jobs: TrainingJobs, short: TrainingConfig) -> None:
    id = jobs.start(short, "My <dog>  no. 1")
    job = wait(jobs, id, has_ended)
    assert (job.state, job.name, job.step, job.total_steps) == ("finished", "My <dog> no. 1", 4, 4)
    assert job.adapter is not None and read_adapter(job.adapter)[0].instance_prompt == "a photo of sks dog"
    assert [step for step, _ in job.losses] == [1, 2, 3, 4]
    assert [entry.step for entry in job.history] == [1, 2, 3, 4]
    assert sorted(path.name for path in job.folder.photos.iterdir()) == [f"{number}.png" for number in range(5)]
    with pytest.raises(UserError, match="finished already"):
        jobs.stop(id)


@pytest.mark.parametrize("seed", range(3))
def test_stop_leaves_an_adapter(jobs: TrainingJobs, short: TrainingConfig, seed: int) -> None:
    assert_stopped_with_all_saved(jobs, stop_at_a_random_moment(jobs, short, seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 23))
def test_stop_leaves_an_adapter_at_any_moment(jobs: TrainingJobs, short: TrainingConfig, seed: int) -> None:
    assert_stopped_with_all_saved(jobs, stop_at_a_random_moment(jobs, short, seed))


def test_two_apps_start_one_run_at_a_time(
    jobs: TrainingJobs, short: TrainingConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    play_runs(monkeypatch)
    other = TrainingJobs(tmp_path / "training")
    ids = [(jobs, other)[number % 2].start(endless(short), "Собака" if number == 1 else "a") for number in range(4)]
    assert ids == ["a-1", "training-1", "a-2", "a-3"]
    for app in (jobs, other):
        assert [job.id for job in app.jobs()] == ids[::-1]
        assert [(job.state, job.queue_position) for job in app.jobs()] == [
            ("queued", 3), ("queued", 2), ("queued", 1), ("running", None),
        ]  # fmt: skip
    other.stop(ids[2])  # waits: it leaves the queue
    assert not (tmp_path / "training" / ids[2]).exists()
    with pytest.raises(UserError, match="no longer there"):
        jobs.get(ids[2])
    for number in (0, 1, 3):
        wait(jobs, ids[number], is_running)
        assert sum(job.state == "running" for job in other.jobs()) == 1
        other.stop(ids[number])
        assert wait(jobs, ids[number], has_ended).state == "stopped"
    assert not any(job.is_active for job in jobs.jobs())


@pytest.mark.skipif(not psutil.POSIX, reason="Windows has no sessions")
def test_ctrl_c_in_the_app_s_terminal_is_not_for_runs(
    jobs: TrainingJobs, short: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_runs(monkeypatch)
    process = process_of(wait(jobs, jobs.start(endless(short), "dog"), is_running))
    assert os.getsid(process.pid) == process.pid


@pytest.mark.slow
def test_a_run_outlives_the_app(jobs: TrainingJobs, short: TrainingConfig, tmp_path: Path) -> None:
    settings = write_config(endless(short), tmp_path / "settings.yaml")
    app = f"""
import time
from pathlib import Path
from svft_diffusion.app.jobs.training_jobs import TrainingJobs
from svft_diffusion.cli.train import read_settings
from svft_diffusion.settings import config_from_mapping
from svft_diffusion.structured_files import read_structured
from svft_diffusion.training.card import write_config
from svft_diffusion.training.config import TrainingConfig
config = config_from_mapping(TrainingConfig, read_settings(Path({str(settings)!r})))
print(TrainingJobs(Path({str(tmp_path / "training")!r})).start(config, "dog"))
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", app], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        id = process.stdout.readline().strip()
        process.kill()
    job = wait(jobs, id, is_running)
    assert process_of(job).ppid() != process.pid
    jobs.stop(id)
    assert_stopped_with_all_saved(jobs, wait(jobs, id, has_ended))


def test_a_run_stops_after_its_first_step_without_the_app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = JobFolder(tmp_path / "dog-1")
    job.result.mkdir(parents=True)
    job.stop_asked.touch()

    def train(command: str, arguments: list[str]) -> int:
        assert (command, arguments) == ("train", ["--config", "x.yaml"])
        time.sleep(0.1)
        assert not (job.result / "stop").exists()
        (job.result / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n', encoding="utf-8")
        deadline = time.monotonic() + 20
        while not (job.result / "stop").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return 7 if (job.result / "stop").exists() else 0

    monkeypatch.setattr(app_training, "run_command", train)
    monkeypatch.setattr(app_training, "_SECONDS_BETWEEN_LOOKS", 0.01)
    assert app_training.main([str(job.path), "--config", "x.yaml"]) == 7


def test_a_stop_before_the_first_step_waits_for_an_adapter(
    jobs: TrainingJobs, short: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_runs(monkeypatch)
    id = jobs.start(endless(short, "a photo of slow dog"), "dog")
    jobs.stop(id)
    job = wait(jobs, id, lambda job: job.stage == "training")
    assert job.stop_asked and not (job.folder.result / "stop").exists()
    jobs.stop(id)  # asked again: at once
    assert wait(jobs, id, has_ended).state == "stopped"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [("a photo of refused dog", "can't read photo.png: no picture"), ("a photo of sks dog", "ended without a word")],
)
def test_a_run_that_dies_is_told_with_its_reason(
    jobs: TrainingJobs, short: TrainingConfig, monkeypatch: pytest.MonkeyPatch, prompt: str, reason: str, tmp_path: Path
) -> None:
    play_runs(monkeypatch)
    id = jobs.start(endless(short, prompt), "dog")
    if "refused" not in prompt:
        process_of(wait(jobs, id, is_running)).kill()
    job = wait(jobs, id, has_ended)
    assert job.state == "failed" and job.reason is not None
    assert reason in job.reason and str(tmp_path) not in job.reason
    # The next one starts all the same.
    assert wait(jobs, jobs.start(endless(short), "dog"), is_running).state == "running"


def test_another_process_of_the_same_number_is_none_of_ours() -> None:
    me = psutil.Process()
    assert process_runs(ProcessMark(me.pid, me.create_time()))
    assert not process_runs(ProcessMark(me.pid, me.create_time() - 60))


@pytest.mark.parametrize(
    ("record", "state"),
    [
        ({"pid": psutil.Process().pid, "started": 0.0}, "failed"),
        ({"begun": 1e12}, "running"),  # just now: whoever starts it is about to record it
        ({"begun": 0.0}, "failed"),
        ({}, "failed"),
    ],
)
def test_the_record_of_a_process_is_trusted_with_care(
    jobs: TrainingJobs,
    short: TrainingConfig,
    monkeypatch: pytest.MonkeyPatch,
    record: dict[str, float],
    state: str,
) -> None:
    monkeypatch.setattr(TrainingJobs, "_advance", lambda self: False)
    id = jobs.start(short, "dog")
    assert jobs.get(id).state == "queued"
    (jobs.get(id).folder.path / "process.json").write_text(json.dumps(record))
    assert jobs.get(id).state == state
    (jobs.get(id).folder.path / "process.json").write_text("{}")


def test_what_can_not_be_started_is_said_and_leaves_nothing(
    jobs: TrainingJobs, short: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingJobs, "_advance", lambda self: False)
    for name in ("", "  ", "x" * 61):
        with pytest.raises(UserError, match="a name of at most"):
            jobs.start(short, name)
    with pytest.raises(UserError, match="learning_rate must be above 0"):
        jobs.start(dataclasses.replace(short, learning_rate=-1.0), "dog")
    with pytest.raises(UserError, match="no such folder"):
        jobs.start(dataclasses.replace(short, instance_data_dir=tmp_path / "none"), "dog")
    assert jobs.jobs() == [] and list((tmp_path / "training").glob("*")) == []
    monkeypatch.setattr(training_jobs, "MOST_QUEUED", 1)
    jobs.start(short, "dog")
    with pytest.raises(UserError, match="wait already"):
        jobs.start(short, "dog")
    assert len(jobs.jobs()) == 1


@pytest.mark.parametrize("id", ["", "..", "../dog-1", "dog-1/..", "dog-1\n", "/etc", "dog", "DOG-1", "dog-1\0"])
def test_only_ids_name_jobs(
    jobs: TrainingJobs, short: TrainingConfig, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingJobs, "_advance", lambda self: False)
    jobs.start(short, "dog")
    with pytest.raises(UserError, match="no longer there"):
        jobs.get(id)
    with pytest.raises(UserError, match="no longer there"):
        jobs.stop(id)


def test_trainings_of_one_class_share_its_pictures(
    jobs: TrainingJobs, short: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingJobs, "_advance", lambda self: False)
    prior = dataclasses.replace(short, with_prior_preservation=True, class_prompt="a photo of a dog")
    configs = [prior, prior, dataclasses.replace(prior, class_prompt="a photo of a cat")]
    texts = [jobs.get(jobs.start(config, "dog")).folder.config.read_text(encoding="utf-8") for config in configs]
    folders = [next(line for line in text.splitlines() if line.startswith("class_data_dir")) for text in texts]
    assert folders[0] == folders[1] != folders[2]


def test_the_page_counts_the_class_images_that_are_drawn(
    jobs: TrainingJobs, short: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingJobs, "_advance", lambda self: False)
    prior = dataclasses.replace(short, with_prior_preservation=True, class_prompt="a photo of a dog")
    id = jobs.start(dataclasses.replace(prior, num_class_images=5), "dog")
    folder = jobs.get(id).folder
    monkeypatch.setattr(JobFolder, "_works", lambda self: True)
    folder.begin()
    folder.result.mkdir()
    status = {"state": "drawing class images", "step": None, "total_steps": None}
    (folder.result / "status.json").write_text(json.dumps(status))
    assert jobs.get(id).class_images == (0, 5)
    settings = read_structured(folder.config, "--config")
    drawn = Path(settings["class_data_dir"])
    drawn.mkdir(parents=True)
    listed = {"recipe": {}, "drawn": {"0": "ab", "1": "cd", "3": ""}, "withheld": [2]}
    (drawn / "class_images.json").write_text(json.dumps(listed))
    text = status_html(jobs.get(id))
    assert f"Drawing class images: 3 of 5, then {short.max_train_steps} steps." in text
    assert 'max="5" value="3"' in text
    (folder.result / "status.json").write_text(json.dumps(status | {"state": "training", "step": 1}))
    assert jobs.get(id).class_images is None and "Training: step 1 of" in status_html(jobs.get(id))
    (folder.result / "status.json").write_text(json.dumps(status | {"state": "stopped"}))


def test_a_training_that_has_ended_can_be_deleted_whole(
    jobs: TrainingJobs, short: TrainingConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    play_runs(monkeypatch)
    other = TrainingJobs(tmp_path / "training")
    id = jobs.start(endless(short), "dog")
    wait(jobs, id, is_running)
    with pytest.raises(UserError, match="stop it first"):
        jobs.delete(id, jobs.get(id).created)
    jobs.stop(id)
    wait(other, id, lambda job: has_ended(job) and not job.folder.is_busy())
    other._advance()
    created = jobs.get(id).created
    with pytest.raises(UserError, match="another one has its name"):
        jobs.delete(id, created - 1)
    jobs.delete(id, created)
    assert jobs.jobs() == [] and [path.name for path in (tmp_path / "training").iterdir()] == [".queue.lock"]
    for wrong in (id, "../dog-1", ".queue.lock", ""):
        with pytest.raises(UserError, match="no longer there"):
            jobs.delete(wrong, created)
    # The next one is called so, and an app that has seen the end of the first still knows that it runs.
    assert jobs.start(endless(short), "dog") == id
    wait(jobs, id, is_running)
    second = other.start(endless(short), "cat")
    other._advance()
    assert other.get(second).state == "queued"


def test_refused_photos_are_told_without_their_folder(
    jobs: TrainingJobs, short: TrainingConfig, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"none")
    with pytest.raises(UserError, match="no usable photo") as caught:
        jobs.start(dataclasses.replace(short, instance_data_dir=tmp_path / "photos"), "dog")
    assert str(tmp_path) not in str(caught.value)


def test_trainings_compute_where_the_app_was_told_to(
    short: TrainingConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[dict[str, str]] = []

    def refuse(command: list[str], **options: Any) -> None:
        started.append(options["env"])
        raise OSError("no process")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    for device in ("auto", "cpu", "cuda:1", "cuda:3"):
        jobs = TrainingJobs(tmp_path / device.replace(":", ""), device)
        assert wait(jobs, jobs.start(short, "dog"), has_ended).reason == "no process can be started: no process"
    names = ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES")
    assert [[env.get(name) for name in names] for env in started] == [
        [None, "4,7"], ["true", "4,7"], [None, "7"], [None, "3"],
    ]  # fmt: skip


def test_a_folder_of_the_embedded_models_name_is_not_meant(
    jobs: TrainingJobs, short: TrainingConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(TrainingJobs, "_advance", lambda self: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toybox").mkdir()
    config = dataclasses.replace(short, pretrained_model_name_or_path="toybox")
    assert jobs.get(jobs.start(config, "dog")).base == "toybox"
