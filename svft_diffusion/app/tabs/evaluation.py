"""The lower part of Compare: how well the adapters of a training do, measured as `svft-diffusion evaluate` does."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from svft_diffusion.app.assets import asset
from svft_diffusion.app.components.choices import new_choices
from svft_diffusion.app.components.report_view import report_html
from svft_diffusion.app.config import AppConfig
from svft_diffusion.app.context import AppContext, Shared, shows_user_errors
from svft_diffusion.app.jobs.evaluation_jobs import EvaluationJob, EvaluationJobs
from svft_diffusion.app.jobs.evaluation_runs import Run, reports_of, runs_below
from svft_diffusion.app.jobs.job_folder import RUNNING
from svft_diffusion.app.serving.served import served_copy
from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.config import EvaluationConfig
from svft_diffusion.models.loading import is_single_file

_ENDS = {"finished": "finished", "stopped": "stopped; what was drawn is kept, and Evaluate goes on with it"}


@dataclass(frozen=True)
class EvaluationForm:
    """What can be chosen of an evaluation."""

    num_images: gr.Number
    num_class_images: gr.Number
    steps: gr.Number
    num_prompts: gr.Number
    with_base: gr.Checkbox

    @property
    def inputs(self) -> list[Any]:
        return [self.num_images, self.num_class_images, self.steps, self.num_prompts, self.with_base]


@dataclass(frozen=True)
class EvaluationView:
    """Which training, how far its evaluation is, and what was found."""

    timer: gr.Timer
    run: gr.Dropdown
    status: gr.HTML
    stop: gr.Button
    reports: gr.Dropdown
    report: gr.HTML
    pictures: gr.Gallery
    seen: gr.State  # the last evaluation that was seen running, or None

    @property
    def of_run(self) -> list[Any]:
        """What changes with the run."""
        return [self.reports, self.report, self.pictures]


def build(context: AppContext, shared: Shared) -> None:
    """Place it."""
    gr.Markdown("## How well a training did")
    run = gr.Dropdown([], value=None, label="Training", elem_id="evaluation-run")
    with gr.Accordion("Evaluate", open=False, elem_id="evaluation"):
        form = _form()
        start = gr.Button("Evaluate", variant="primary", elem_id="evaluation-start")
    view = _view(run)

    page = EvaluationEvents(context)
    private: dict[str, Any] = {"api_visibility": "private"}
    quiet: dict[str, Any] = private | {"show_progress": "hidden"}
    # Everybody sees the same evaluation, and a page that comes later finds it.
    followed = [view.timer, view.status, view.stop, view.seen]
    assert Context.root_block is not None
    refresh = gr.on(
        [Context.root_block.load, shared.tab.select, run.focus], page.refresh, run, [run, *followed], **quiet
    )
    refresh.then(page.reports, [run, view.reports], view.of_run, **quiet)
    run.input(page.reports, [run, view.reports], view.of_run, **quiet)
    view.reports.input(page.show, [run, view.reports], [view.report, view.pictures], **quiet)
    start.click(page.start, [run, *form.inputs], followed, **private)
    view.stop.click(page.stop, None, followed, **private)
    view.timer.tick(page.follow, [run, view.seen], [*followed, *view.of_run], trigger_mode="once", **quiet)


def _form() -> EvaluationForm:
    usual = EvaluationConfig()
    narrow: dict[str, Any] = {"precision": 0, "min_width": 150}
    with gr.Row(equal_height=True):
        num_images = gr.Number(1, label="Pictures for each prompt", minimum=1, elem_id="evaluation-images", **narrow)
        num_class_images = gr.Number(
            8, label="Pictures of the class", minimum=0, elem_id="evaluation-class-images", **narrow
        )
        steps = gr.Number(
            usual.num_inference_steps, label="Denoising steps", minimum=1, elem_id="evaluation-steps", **narrow
        )
        num_prompts = gr.Number(
            0, label="First prompts only, 0 for all", minimum=0, elem_id="evaluation-prompts", **narrow
        )
    gr.Markdown(
        f"The DreamBooth paper takes {usual.num_images} pictures for each of 25 prompts; fewer are quicker but coarser."
    )
    with_base = gr.Checkbox(True, label="The base model, too", elem_id="evaluation-base")
    return EvaluationForm(num_images, num_class_images, steps, num_prompts, with_base)


def _view(run: gr.Dropdown) -> EvaluationView:
    with gr.Row():
        status = gr.HTML(elem_id="evaluation-status")
        stop = gr.Button("Stop", variant="stop", visible=False, scale=0, min_width=100, elem_id="evaluation-stop")
    reports = gr.Dropdown([], value=None, label="Report", visible=False, elem_id="evaluation-reports")
    report = gr.HTML(css_template=asset("report.css"), elem_id="evaluation-report")
    pictures = gr.Gallery(
        label="Plots and contact sheets",
        format="png",
        columns=3,
        height="auto",
        object_fit="contain",
        interactive=False,
        visible=False,
        elem_id="evaluation-pictures",
    )
    return EvaluationView(gr.Timer(1.0, active=False), run, status, stop, reports, report, pictures, gr.State(None))


class EvaluationEvents:
    """What happens when something in this part is used, and every second while an evaluation runs."""

    def __init__(self, context: AppContext) -> None:
        self._context = context
        self._config = context.config
        self._jobs = EvaluationJobs(context.config.evaluation_dir)

    def refresh(self, chosen: str | None) -> list[Any]:
        """The runs that there are, and the evaluation that runs, or ended last."""
        runs = self._runs()
        choices = [(run.name, run.id) for run in runs]
        return [new_choices(choices, chosen, runs[0].id if runs else None), *self._followed()]

    def reports(self, chosen: str | None, report: str | None) -> list[Any]:
        """The reports of a run, and the latest of them if another one was chosen before."""
        run = self._found(chosen)
        if run is None:
            said = "No training has kept adapters yet: start one under Train." if not self._runs() else ""
            return [gr.update(choices=[], value=None, visible=False), said, gr.update(value=[], visible=False)]
        found = reports_of(run, self._config.evaluation_dir)
        if not found:
            said = "There is no report of this training yet; press Evaluate."
            return [gr.update(choices=[], value=None, visible=False), said, gr.update(value=[], visible=False)]
        shown = next((one for one in found if one.id == report), found[0])
        choices = gr.update(choices=[(one.label, one.id) for one in found], value=shown.id, visible=True)
        pictures = [(served_copy(file), file.stem) for file in shown.pictures()]
        return [choices, report_html(shown), gr.update(value=pictures, visible=bool(pictures))]

    def show(self, chosen: str | None, report: str | None) -> list[Any]:
        """One of the reports."""
        return self.reports(chosen, report)[1:]

    @shows_user_errors
    def start(
        self,
        chosen: str | None,
        num_images: int | None,
        num_class_images: int | None,
        steps: int | None,
        num_prompts: int | None,
        with_base: bool,
    ) -> list[Any]:
        """Begin an evaluation of the chosen run."""
        run = self._found(chosen)
        if run is None:
            raise UserError("choose a training first; those that kept adapters of their steps are in the list")
        if num_images is None or num_class_images is None or steps is None:
            raise UserError("fill in how many pictures, and how many steps")
        config = self._config
        base = _offered(config, run.base)
        self._jobs.start(
            run,
            EvaluationConfig(
                num_images=int(num_images),
                num_class_images=int(num_class_images),
                num_inference_steps=int(steps),
                num_prompts=int(num_prompts or 0) or None,
                with_base=bool(with_base),
                pretrained_model_name_or_path=base,
                base_config=config.base_config if base is not None and is_single_file(base) else None,
                on_mismatch=config.on_mismatch,
                disable_safety_checker=config.disable_safety_checker,
                device=config.device,
                dtype=config.dtype,
                factor_cache=config.factor_cache,
                factor_cache_size=config.factor_cache_size,
            ),
        )
        return self._followed()

    @shows_user_errors
    def stop(self) -> list[Any]:
        """End the evaluation that runs."""
        job = self._latest()
        if job is None:
            raise UserError("no evaluation runs")
        self._jobs.stop(job.id)
        return self._followed()

    def follow(self, chosen: str | None, seen: str | None) -> list[Any]:
        """How far it is; when it has ended, the new report."""
        job = self._latest()
        ended = job is not None and job.state != RUNNING and job.id == seen
        of_run = self.reports(chosen, None) if ended else [gr.skip()] * 3
        return [*self._followed(), *of_run]

    def _followed(self) -> list[Any]:
        """Timer, status, button and the evaluation that was seen running."""
        job = self._latest()
        runs = job is not None and job.state == RUNNING
        return [
            gr.Timer(active=runs),
            "" if job is None else status_html(job),
            gr.update(visible=runs),
            job.id if job is not None and runs else None,
        ]

    def _latest(self) -> EvaluationJob | None:
        return next(iter(self._jobs.jobs()), None)

    def _runs(self) -> list[Run]:
        names: dict[Path, str] = {job.folder.result: job.name for job in self._context.jobs.jobs()}
        return runs_below(self._config.adapters_dir.absolute(), names)

    def _found(self, chosen: str | None) -> Run | None:
        return next((run for run in self._runs() if run.id == chosen), None)


def status_html(job: EvaluationJob) -> str:
    """How far an evaluation is, or how it ended."""
    name = html.escape(job.name)
    if job.state == "failed":
        return f'<p role="alert">The evaluation of {name} failed: {html.escape((job.reason or "").rstrip("."))}.</p>'
    if job.state != RUNNING:
        return f"<p>The evaluation of {name} {_ENDS.get(job.state, job.state)}.</p>"
    if not job.total:
        return f'<p role="status">Evaluating {name}: preparing.</p>'
    stage = "scoring" if job.stage == "scoring" else f"drawing with {html.escape(job.stage or 'the base model')}"
    return (
        f'<p role="status">Evaluating {name}: {stage}, {job.done} of {job.total}.</p>'
        f'<progress aria-label="Progress of the evaluation" max="{job.total}" value="{job.done}"></progress>'
    )


def _offered(config: AppConfig, base: str | None) -> str | None:
    """The base model of a run, if the app may load it; None: what its adapters name.

    Raises:
        UserError: it is not one of those on offer, and others reach the app.
    """
    if not config.open_to_others:
        return base
    for offered in config.bases:
        if base in (offered, str(Path(offered).absolute())):
            return offered
    raise UserError("this training is of a base model that is not offered here; evaluate it on the command line")
