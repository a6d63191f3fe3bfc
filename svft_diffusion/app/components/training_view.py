"""What the page shows of trainings: the list, and of one of them how far it is, its samples and the steps it kept."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import pandas
from PIL import Image

from svft_diffusion.app.components.training_form import duration_in_words
from svft_diffusion.app.jobs.training_jobs import Job
from svft_diffusion.data.photos import UnusablePhoto, open_photo
from svft_diffusion.models.loading import base_display_name
from svft_diffusion.training.history import HistoryEntry

MOST_LISTED = 50
_STATES = {
    "queued": "waiting",
    "running": "running",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
}

Seen = dict[str, Any]
"""What a page shows already, part by part: a part that is the same is not sent again."""


@dataclass(frozen=True)
class TrainingView:
    """The components, in the order in which `shown` returns what they show."""

    timer: gr.Timer
    seen: gr.State
    choice: gr.Radio
    panel: gr.Column
    status: gr.HTML
    stop: gr.Button
    losses: gr.LinePlot
    samples: gr.Gallery
    history: gr.Column
    step: gr.Slider
    step_text: gr.Markdown
    prompt: gr.Textbox
    step_samples: gr.Gallery
    use: gr.Button
    none_yet: gr.Markdown
    delete: gr.Button
    confirm: gr.Column
    delete_now: gr.Button
    keep: gr.Button

    @property
    def outputs(self) -> list[Any]:
        return [
            self.timer, self.seen, self.choice, self.panel, self.status, self.stop, self.losses, self.samples,
            self.history, self.step, self.step_text, self.prompt, self.step_samples, self.none_yet,
            self.delete, self.confirm,
        ]  # fmt: skip


def training_view() -> TrainingView:
    """Place the components, empty."""
    gr.Markdown("## Trainings")
    none_yet = gr.Markdown(
        "None yet. Training runs on when you close the page; its loss, samples and steps are shown here.",
        elem_id="training-none",
    )
    choice = gr.Radio(
        [], label="All trainings, the latest first", elem_id="training-choice", visible=False, elem_classes="job-list"
    )
    with gr.Column(visible=False, elem_id="training-panel") as panel:
        status = gr.HTML(elem_id="training-status")
        stop = gr.Button("Stop", variant="stop", elem_id="training-stop")
        losses = gr.LinePlot(
            x="step", y="loss", label="Loss", x_title="step", y_title="loss", height=220, elem_id="training-losses"
        )
        samples = _samples("Newest samples", "training-samples")
        with gr.Column(visible=False, elem_id="training-history") as history:
            gr.Markdown("### Steps that were kept")
            step = gr.Slider(0, 1, step=1, label="Step", elem_id="training-step")
            step_text = gr.Markdown(elem_id="training-step-text")
            prompt = gr.Textbox(label="Prompt of the samples", interactive=False, elem_id="training-prompt")
            step_samples = _samples("Samples of this step", "training-step-samples")
            use = gr.Button("Use this step", variant="primary", elem_id="training-use-step")
        delete = gr.Button("Delete this training", visible=False, elem_id="training-delete")
        with gr.Column(visible=False, elem_id="training-delete-confirm") as confirm:
            gr.Markdown("Its photos, settings, samples and adapters go for good, those in the Library, too.")
            with gr.Row():
                delete_now = gr.Button("Delete for good", variant="stop")
                keep = gr.Button("Keep")
    timer = gr.Timer(1.0, active=False)
    return TrainingView(
        timer, gr.State({}), choice, panel, status, stop, losses, samples, history, step, step_text, prompt,
        step_samples, use, none_yet, delete, confirm, delete_now, keep,
    )  # fmt: skip


def shown(jobs: Sequence[Job], chosen: str | None, seen: Seen) -> list[Any]:
    """What the `TrainingView` shows, in the order of its outputs; parts that the page has already are skipped.

    Args:
        jobs: all of them, the latest first.
        chosen: id of the one to show; the latest if it is no longer there.
    """
    job = next((job for job in jobs if job.id == chosen), jobs[0] if jobs else None)
    now: Seen = {
        "timer": any(one.is_active for one in jobs),
        "choice": ([(job_label(one), one.id) for one in jobs[:MOST_LISTED]], job and job.id),
        "panel": job is not None,
        "none_yet": job is None,
    }
    updates = {
        "timer": gr.Timer(active=now["timer"]),
        "choice": gr.update(choices=now["choice"][0], value=now["choice"][1], visible=bool(jobs)),
        "panel": gr.update(visible=job is not None),
        "none_yet": gr.update(visible=job is None),
    }
    if job is not None:
        history = [] if job.is_active else job.history
        now |= {
            "status": status_html(job),
            "stop": (job.state, job.stop_asked),
            "losses": (job.id, job.step, job.state),
            # Once it has ended, they are those of the last step below.
            "samples": (job.id, [str(path) for path in job.samples] if job.is_active else []),
            "history": (job.id, [entry.step for entry in history]),
            "prompt": job.prompt,
            "delete": (job.id, job.is_active, job.created),
        }
    updates = {part: update for part, update in updates.items() if now[part] != seen.get(part)}
    if job is not None:
        updates |= _of_job(job, {part for part, value in now.items() if value != seen.get(part)})
    parts = (
        "choice", "panel", "status", "stop", "losses", "samples", "history", "step", "step_text", "prompt",
        "step_samples", "none_yet", "delete", "confirm",
    )  # fmt: skip
    return [updates.get("timer", gr.skip()), now, *(updates.get(part, gr.skip()) for part in parts)]


def _of_job(job: Job, changed: set[str]) -> dict[str, Any]:
    updates: dict[str, Any] = {}
    if "status" in changed:
        updates["status"] = status_html(job)
    if "stop" in changed:
        label = "Remove from the queue" if job.state == "queued" else "Stop at once" if job.stop_asked else "Stop"
        updates["stop"] = gr.update(value=label, visible=job.is_active)
    if "losses" in changed:
        updates["losses"] = loss_points(job)
    if "samples" in changed:
        updates["samples"] = gr.update(value=pictures(job.samples), visible=job.is_active and bool(job.samples))
    if "history" in changed:
        updates |= _of_history([] if job.is_active else job.history)
    if "prompt" in changed:
        updates["prompt"] = gr.update(value=job.prompt, visible=bool(job.prompt))
    if "delete" in changed:
        updates |= {"delete": gr.update(visible=not job.is_active), "confirm": gr.update(visible=False)}
    return updates


def _of_history(history: Sequence[HistoryEntry]) -> dict[str, Any]:
    if not history:
        return {"history": gr.update(visible=False)}
    steps = [entry.step for entry in history]
    several = len(steps) > 1
    slider = gr.update(
        minimum=steps[0] if several else 0,  # a slider needs two ends
        maximum=steps[-1],
        step=math.gcd(*(step - steps[0] for step in steps)) or 1,
        value=steps[-1],
        interactive=several,
    )
    text, samples = of_step(history[-1])
    return {"history": gr.update(visible=True), "step": slider, "step_text": text, "step_samples": samples}


def of_step(entry: HistoryEntry) -> tuple[str, Any]:
    """What is said of one step of the history, and its samples."""
    loss = "" if entry.loss is None else f", loss {entry.loss:.4f}"
    drawn = "" if entry.samples else "; no samples were drawn at this step"
    return f"After step {entry.step}{loss}{drawn}.", gr.update(
        value=pictures(entry.samples), visible=bool(entry.samples)
    )


def nearest(history: Sequence[HistoryEntry], step: float) -> HistoryEntry | None:
    """The step of the history that a slider means."""
    return min(history, key=lambda entry: abs(entry.step - step), default=None)


def pictures(paths: Sequence[Path]) -> list[Image.Image]:
    """Samples, without those that are gone or half written."""
    found = []
    for path in paths:
        try:
            found.append(open_photo(path))
        except UnusablePhoto:
            continue
    return found


def loss_points(job: Job) -> pandas.DataFrame:
    """The loss curve."""
    return pandas.DataFrame(job.losses, columns=["step", "loss"])


def job_label(job: Job) -> str:
    """The job in the list."""
    place = f", number {job.queue_position} in the queue" if job.queue_position is not None else ""
    return f"{job.name} ({job.id}): {_STATES[job.state]}{place}"


def status_html(job: Job) -> str:
    """State, step n of N and the time that is left."""
    lines = [f"<p><strong>{html.escape(job.name)}</strong> on {html.escape(base_display_name(job.base))}</p>"]
    said = html.escape(_state_in_words(job))
    lines.append(f'<p role="alert">{said}</p>' if job.state == "failed" else f"<p>{said}</p>")
    if job.state == "running" and job.total_steps:
        what, done, total = "training", job.step, job.total_steps
        if job.class_images is not None:
            what, (done, total) = "class images", job.class_images
        lines.append(
            f'<progress aria-label="Progress of the {what}" max="{total}" value="{done}" '
            'style="width: 100%"></progress>'
        )
    return "".join(lines)


def _state_in_words(job: Job) -> str:
    if job.state == "queued":
        return f"Waiting, number {job.queue_position} in the queue."
    if job.state == "failed":
        kept = " The steps below were kept." if job.history else ""
        return f"Failed after step {job.step}: {(job.reason or '').rstrip('.')}.{kept}"
    if job.state == "stopped":
        return f"Stopped after step {job.step}." if job.adapter else "Stopped before its first step: no adapter."
    if job.state == "finished":
        return f"Finished: {job.step} steps."
    left = "" if not job.eta_seconds else f", about {duration_in_words(job.eta_seconds)} left"
    stage = job.stage[:1].upper() + job.stage[1:]
    stopping = ""
    if job.stop_asked and job.stage != "stopping":
        stopping = (
            " Stops after this step." if job.step else " Stops after its first step, so that there is an adapter."
        )
    if job.class_images is not None:
        done, total = job.class_images
        return f"{stage}: {done} of {total}, then {job.total_steps or '?'} steps.{stopping}"
    return f"{stage}: step {job.step} of {job.total_steps or '?'}{left}.{stopping}"


def _samples(label: str, elem_id: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        format="png",
        columns=2,
        height="auto",
        object_fit="contain",
        interactive=False,
        buttons=["fullscreen"],
        elem_id=elem_id,
    )
