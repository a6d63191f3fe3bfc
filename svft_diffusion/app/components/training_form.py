"""The three steps before a training: photos, the subject's name, and how long to train."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from svft_diffusion.app.config import AppConfig
from svft_diffusion.app.context import QUEUE, AppContext, Shared, shows_user_errors
from svft_diffusion.app.jobs.photo_upload import captions_of, gather, look_at, write_captions
from svft_diffusion.app.jobs.training_estimate import Estimate, Estimates
from svft_diffusion.app.shelf.uploads import called
from svft_diffusion.errors import UserError
from svft_diffusion.markdown import plain
from svft_diffusion.models.loading import EMBEDDED_MODEL, base_display_name, is_single_file
from svft_diffusion.sampling.devices import resolve_device
from svft_diffusion.settings import config_from_mapping
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.memory import memory_in_words
from svft_diffusion.training.presets import SPEEDS, SubjectPrompts, preset_settings

_CAPTION_HEADERS = ["Photo", "What else is in it (optional)"]
_MIXED_PRECISIONS = {"float16": "fp16", "bfloat16": "bf16"}
_ESTIMATE = "estimate"  # concurrency_id: one dry run at a time
_MEASURED_LATER = "The time is measured once the photos are there and the subject has a name."


@dataclass(frozen=True)
class TrainingForm:
    """What the visitor fills in; `inputs` are in the order of `TrainingWishes`."""

    photos: gr.File
    captions: gr.Dataframe
    class_word: gr.Textbox
    trigger: gr.Textbox
    name: gr.Textbox
    speed: gr.Radio
    start: gr.Button

    @property
    def inputs(self) -> list[Any]:
        return [self.photos, self.captions, self.class_word, self.trigger, self.name, self.speed]


@dataclass(frozen=True)
class TrainingWishes:
    """The form, filled in.

    Attributes:
        captions: rows of a photo's name and its caption; None: those that were uploaded with the photos.
    """

    photos: list[str] | None
    captions: list[list[Any]] | None
    class_word: str
    trigger: str
    name: str
    speed: str

    @property
    def prompts(self) -> SubjectPrompts:
        """Raises `UserError` for words that can't be."""
        return SubjectPrompts(self.trigger, self.class_word)

    @property
    def shown_name(self) -> str:
        """What the training is called."""
        return self.name.strip() or f"{self.trigger.strip()} {self.class_word.strip()}"

    @contextmanager
    def as_config(self, context: AppContext, base: str, notes: list[str] | None = None) -> Iterator[TrainingConfig]:
        """The settings of the run; photos and captions lie in a folder that is gone afterwards.

        Args:
            notes: gets a line for each photo that is left out for its size.

        Raises:
            UserError: something is missing or can't be.
        """
        config = context.config
        with tempfile.TemporaryDirectory() as name, called("the upload", Path(name) / "photos"):
            folder = Path(name)
            photos = folder / "photos"
            photos.mkdir()
            skipped = gather(self.photos or [], photos, most_pixels=config.max_pixels)
            if notes is not None:
                notes += skipped
            prompts = self.prompts  # after the photos, as on the page
            captions = captions_of(photos.iterdir()) if self.captions is None else _typed_captions(self.captions)
            write_captions(photos, captions, prompts.instance_prompt, prompts.trigger.strip())
            settings = preset_settings(base, self.speed, prompts, folder)
            yield config_from_mapping(
                TrainingConfig,
                settings
                | {
                    "instance_data_dir": photos,
                    **_precision(base, config),
                    "base_config": config.base_config if is_single_file(base) else None,
                    "factor_cache": config.factor_cache,
                    "factor_cache_size": config.factor_cache_size,
                },
            )


def _precision(base: str, config: AppConfig) -> dict[str, Any]:
    """What the app draws in on a GPU, trainings of a large base compute in, too."""
    if base == EMBEDDED_MODEL or config.dtype == "float32" or resolve_device(config.device).type != "cuda":
        return {}
    return {"mixed_precision": _MIXED_PRECISIONS[config.dtype]}


def training_form(context: AppContext, shared: Shared) -> TrainingForm:
    """Place the form; its Start button is wired by whoever shows the training."""
    form, look, words, estimate = _layout(context)
    page = _FormEvents(context)
    gr.on(
        [form.photos.change, shared.base.change],
        page.look_at_photos,
        inputs=[form.photos, form.captions, shared.base],
        outputs=[*look, form.captions],
        concurrency_id=QUEUE,
        concurrency_limit=1,
        api_visibility="private",
    ).then(
        page.estimate,
        inputs=[*form.inputs, shared.base],
        outputs=estimate,
        concurrency_id=_ESTIMATE,
        concurrency_limit=1,
        api_visibility="private",
    )
    gr.on(
        [form.class_word.change, form.trigger.change, shared.base.change],
        page.show_prompts,
        inputs=[form.class_word, form.trigger, shared.base],
        outputs=words,
        show_progress="hidden",
        trigger_mode="always_last",
        api_visibility="private",
    )
    gr.on(
        [form.class_word.blur, form.class_word.submit, form.trigger.blur, form.speed.change, shared.base.change],
        page.estimate,
        inputs=[*form.inputs, shared.base],
        outputs=estimate,
        trigger_mode="always_last",
        concurrency_id=_ESTIMATE,
        concurrency_limit=1,
        api_visibility="private",
    )
    return form


def _layout(context: AppContext) -> tuple[TrainingForm, list[Any], gr.Markdown, gr.Markdown]:
    base = context.config.pretrained_model_name_or_path
    gr.Markdown(
        "## 1. Photos\nThree to six of the subject, sharp, in different surroundings; captions in text files of "
        "the same names, if you have some."
    )
    photos = gr.File(
        label="Photos",
        file_count="multiple",
        file_types=["image", ".heic", ".heif", ".txt"],
        elem_id="training-photos",
        height=140,
    )
    sheet = gr.Image(
        label="What training will see",
        visible=False,
        interactive=False,
        format="png",
        buttons=["fullscreen"],
        elem_id="training-sheet",
    )
    notes = gr.HTML(visible=False, elem_id="training-photo-notes")
    with gr.Accordion("Captions", open=False):
        captions = gr.Dataframe(
            headers=_CAPTION_HEADERS,
            datatype="str",
            type="array",
            column_count=2,
            static_columns=[0],
            interactive=True,
            wrap=True,
            label="Say what is not the subject, such as: on the grass",
            elem_id="training-captions",
        )
    gr.Markdown("## 2. Name")
    with gr.Row():
        class_word = gr.Textbox(label="Kind of thing", placeholder="dog", max_length=60, elem_id="training-class")
        trigger = gr.Textbox("sks", label="Trigger word: a rare one", max_length=60, elem_id="training-trigger")
        name = gr.Textbox(label="Name of the training (optional)", max_length=60, elem_id="training-name")
    words = gr.Markdown(_prompts_in_words("", "", base), elem_id="training-prompts")
    gr.Markdown("## 3. How long")
    speed = gr.Radio(
        [(speed.capitalize(), speed) for speed in SPEEDS], value="balanced", label="Training", elem_id="training-speed"
    )
    estimate = gr.Markdown(_MEASURED_LATER, elem_id="training-estimate")
    start = gr.Button("Start training", variant="primary", elem_id="training-start")
    form = TrainingForm(photos, captions, class_word, trigger, name, speed, start)
    return form, [sheet, notes], words, estimate


class _FormEvents:
    """What happens while the form is filled in."""

    def __init__(self, context: AppContext) -> None:
        self._context = context
        self._estimates = Estimates(context.config.training_dir, context.config.device)

    @shows_user_errors
    def look_at_photos(self, files: list[str] | None, typed: list[list[Any]], base: str) -> tuple[Any, Any, Any]:
        """The contact sheet, the notes, and a line for each caption; those that were typed in stay."""
        if not files:
            return gr.update(value=None, visible=False), gr.update(value="", visible=False), []
        resolution = self._context.studio.open_base(base)
        with tempfile.TemporaryDirectory() as name:
            skipped = gather(files, Path(name), most_pixels=self._context.config.max_pixels)
            look = look_at(Path(name), resolution)
        count = f"{len(look.captions)} photo{'s' if len(look.captions) > 1 else ''} can be used."
        lines = "".join(f"<li>{html.escape(note)}</li>" for note in [*skipped, *look.notes])
        notes = f"<p>{count}</p>" + (f"<ul>{lines}</ul>" if lines else "")
        kept = {photo: caption for photo, caption in _typed_captions(typed).items() if caption}
        captions = [[photo, kept.get(photo, caption)] for photo, caption in look.captions.items()]
        # What is there already stays alone: more may be typed in meanwhile, such as while another base loads.
        rows = gr.skip() if captions == [list(row) for row in typed] else captions
        return gr.update(value=look.sheet, visible=True), gr.update(value=notes, visible=True), rows

    def show_prompts(self, class_word: str, trigger: str, base: str) -> str:
        """The prompts that are made from the words."""
        return _prompts_in_words(class_word, trigger, base)

    def estimate(self, *values: Any) -> Iterator[str]:
        """How long the training would take; what hinders it is told in place, not as a notice over the form."""
        *filled_in, base = values
        wishes = TrainingWishes(*filled_in)
        if not wishes.photos or not wishes.class_word.strip() or not wishes.trigger.strip():
            yield _MEASURED_LATER
            return
        try:
            with wishes.as_config(self._context, base) as config:
                estimate = self._estimates.known(config)
                if estimate is None and any(job.state == "running" for job in self._context.jobs.jobs()):
                    yield "The time can't be measured while another training runs."
                    return
                if estimate is None:
                    yield "Taking two steps to measure the time ..."
                    estimate = self._estimates.measure(config)
                yield _estimate_in_words(estimate, config)
        except UserError as error:
            yield f"**{plain(str(error))}**"


def _typed_captions(rows: list[list[Any]]) -> dict[str, str]:
    """Caption by the name of its photo."""
    return {str(row[0]): str(row[1] or "") for row in rows if len(row) > 1 and row[0]}


def duration_in_words(seconds: float) -> str:
    """``40 seconds``, ``12 minutes``, ``3 h 20 min``."""
    if seconds < 90:
        whole = max(1, round(seconds))
        return f"{whole} second{'s' if whole > 1 else ''}"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _estimate_in_words(estimate: Estimate, config: TrainingConfig) -> str:
    memory = memory_in_words(estimate.peak_memory, torch.device(estimate.device))
    return f"About **{duration_in_words(estimate.seconds)}** for {config.max_train_steps} steps, {memory} of memory."


def _prompts_in_words(class_word: str, trigger: str, base: str) -> str:
    on = f"Trains on {plain(base_display_name(base))}, the base model that is chosen on Generate."
    if not class_word.strip() or not trigger.strip():
        return on
    try:
        prompts = SubjectPrompts(trigger, class_word)
    except UserError as error:
        return f"{on}\n\n**{plain(str(error))}**"
    note = prompts.note(base)
    lines = [
        on,
        f"The photos are called “{plain(prompts.instance_prompt)}”, others of their kind "
        f"“{plain(prompts.class_prompt)}”.",
    ]
    return "\n\n".join([*lines, *([f"**{plain(note)}**"] if note else [])])
