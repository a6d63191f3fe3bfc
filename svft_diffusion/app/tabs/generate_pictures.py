"""The pictures of a visitor: drawn, shown, found again, and their settings brought back."""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from svft_diffusion.app.components.adapter_cards import with_warnings
from svft_diffusion.app.components.drawing_progress import DrawingProgress, drawing_progress, drawing_status
from svft_diffusion.app.components.picture_details import details_value, picture_details
from svft_diffusion.app.components.stopping import wire_stop
from svft_diffusion.app.context import QUEUE, AppContext, Shared, shows_user_errors
from svft_diffusion.app.drawing.gallery import details_of, history_page
from svft_diffusion.app.drawing.picture_request import SavedPicture, words_on
from svft_diffusion.app.drawing.recall import Recalled, read_picture, recall
from svft_diffusion.app.offered_bases import OfferedBases
from svft_diffusion.app.tabs.generate_model import ModelPicker, loads_later
from svft_diffusion.app.tabs.generate_settings import PictureWishes, SettingsForm
from svft_diffusion.errors import UserError
from svft_diffusion.markdown import plain
from svft_diffusion.sampling.png import told_settings

Visit = list[tuple[str, str]]
"""Files and captions of the pictures of a visit, the newest first."""

_STOPPED = "() => 'Stopped. Pictures that were finished are kept.'"
_NOTHING = "() => null"
_GALLERY: dict[str, Any] = {
    "format": "png",  # files go out as they were saved, with the settings inside
    "object_fit": "contain",
    "interactive": False,
}


@dataclass(frozen=True)
class PicturesView:
    """What is drawn, what was drawn, and how."""

    drawing: gr.HTML
    gallery: gr.Gallery
    visit: gr.State  # Visit
    status: gr.Markdown
    details: gr.HTML
    selected: gr.State  # path of the picture whose details are shown, or None
    recall: gr.Button
    dropped: gr.File


@dataclass(frozen=True)
class HistoryView:
    """The pictures of the output folder, page by page."""

    accordion: gr.Accordion
    gallery: gr.Gallery
    files: gr.State  # list of paths on the page that is shown
    number: gr.State
    position: gr.Markdown
    newer: gr.Button
    older: gr.Button


def pictures_view(context: AppContext) -> tuple[PicturesView, HistoryView | None]:
    """Place everything; the history only where nobody else reaches the page, as it holds everybody's pictures."""
    drawing = drawing_progress()
    gallery = gr.Gallery(
        label="Pictures of this visit",
        elem_id="pictures",
        columns=4,
        height=480,
        preview=True,
        buttons=["download", "fullscreen"],
        **_GALLERY,
    )
    status = drawing_status("picture-status")
    history = None if context.config.open_to_others else _history_view()
    with gr.Accordion("How it was made", open=True):
        details = picture_details()
        again = gr.Button("Recall these settings", size="md", elem_id="recall")
    dropped = gr.File(
        label="Drop a picture to recall its settings",
        file_types=[".png"],
        height=150,
        elem_id="recall-picture",
    )
    view = PicturesView(drawing, gallery, gr.State([]), status, details, gr.State(None), again, dropped)
    return view, history


def _history_view() -> HistoryView:
    with gr.Accordion("All pictures", open=False, elem_id="history") as accordion:
        gallery = gr.Gallery(
            label="All pictures, the newest first",
            show_label=False,
            elem_id="history-pictures",
            columns=4,
            height="auto",
            allow_preview=False,
            **_GALLERY,
        )
        with gr.Row():
            newer = gr.Button("Newer", size="sm", min_width=80)
            position = gr.Markdown(elem_classes="centered")
            older = gr.Button("Older", size="sm", min_width=80)
    return HistoryView(accordion, gallery, gr.State([]), gr.State(1), position, newer, older)


class PictureEvents:
    """What happens when pictures are drawn, chosen, or asked how they were made."""

    def __init__(self, context: AppContext, shared: Shared, form: SettingsForm, picker: ModelPicker) -> None:
        self._context = context
        self._shared = shared
        self._form = form
        self._picker = picker
        self._bases = OfferedBases(context.config)

    def wire(self, view: PicturesView, history: HistoryView | None, generate: gr.Button, stop: gr.Button) -> None:
        """Say which event calls what."""
        private: dict[str, Any] = {"api_visibility": "private"}
        quiet = private | {"show_progress": "hidden"}
        outputs = [self._form.seed, view.drawing, view.gallery, view.visit, view.status, view.details, view.selected]
        draw = generate.click(
            self.draw,
            [self._shared.base, self._shared.cards, view.visit, *self._form.inputs],
            outputs,
            concurrency_id=QUEUE,
            concurrency_limit=1,
            show_progress_on=view.status,
            **private,
        )
        wire_stop(stop, draw, view.drawing)
        stop.click(None, None, view.status, js=_STOPPED, **quiet)
        chosen = [view.details, view.selected]
        view.gallery.select(self.choose_of_visit, view.visit, chosen, queue=False, **quiet)
        recalled = [*self._recalled_fields, *chosen]
        self.wire_recall(view.recall, view.selected, view.details)
        dropped = view.dropped.upload(self.recall_dropped, [view.dropped, self._shared.base], recalled, **quiet)
        # Whatever came of it, the next picture can be dropped.
        dropped.then(None, None, view.dropped, js=_NOTHING, **quiet)
        dropped.failure(None, None, view.dropped, js=_NOTHING, **quiet)
        if history is not None:
            page = [history.gallery, history.files, history.number, history.position]
            history.accordion.expand(self.newest, None, page, **quiet)
            draw.success(self.look_again, history.number, page, **quiet)
            history.newer.click(lambda number: self.turn_to(number - 1), history.number, page, **quiet)
            history.older.click(lambda number: self.turn_to(number + 1), history.number, page, **quiet)
            history.gallery.select(self.choose_of_history, history.files, chosen, queue=False, **quiet)

    def wire_recall(self, button: gr.Button, selected: gr.State, details: gr.HTML) -> None:
        """Let a button bring back the settings of the picture whose path ``selected`` holds."""
        button.click(
            self.recall_chosen,
            [selected, self._shared.base],
            [*self._recalled_fields, details, selected],
            api_visibility="private",
            show_progress="hidden",
        )

    @property
    def _recalled_fields(self) -> list[Any]:
        picker = self._picker
        return [*self._form.inputs, picker.name, picker.status, self._shared.base, self._shared.cards]

    @shows_user_errors
    def draw(self, base: str, cards: object, visit: Visit, *values: Any) -> Iterator[list[Any]]:
        """Draw and save the pictures, and show them while they come. Closing it ends the drawing within a step."""
        studio = self._context.studio
        given = PictureWishes(*values)
        wishes = given.with_seed()
        request = wishes.request(base, cards, self._context.library, studio.on_mismatch)
        progress = DrawingProgress(request.num_images, request.num_inference_steps)
        stay = gr.skip()
        seed = str(request.seed) if given.random_seed else stay  # the visitor may have typed another one since
        yield [seed, progress.started(), stay, stay, "", stay, stay]
        saved: list[SavedPicture] = []
        with closing(studio.draw(request, previews=True)) as events:
            for event in events:
                if isinstance(event, SavedPicture):
                    saved.append(event)
                    visit = [(str(event.path), f"seed {event.seed}"), *visit]
                    shown = gr.update(value=visit, selected_index=0)
                    yield [stay, stay, shown, visit, self._saved(saved), self._details(event.path), str(event.path)]
                elif (value := progress.after(event)) is not None:
                    yield [stay, value, *[stay] * 5]

    def choose_of_visit(self, visit: Visit, event: gr.SelectData) -> tuple[Any, Any]:
        """Show how a picture of the visit was made."""
        return self._chosen([file for file, _ in visit], event.index)

    def choose_of_history(self, files: list[str], event: gr.SelectData) -> tuple[Any, Any]:
        """Show how a picture of the history was made."""
        return self._chosen(files, event.index)

    def newest(self) -> list[Any]:
        """The first page of the history."""
        return self.turn_to(1)

    def look_again(self, number: int) -> list[Any]:
        """The page at hand with what came in the meantime; the others show it when they are turned to."""
        return self.turn_to(number)

    def turn_to(self, number: int) -> list[Any]:
        """A page of the history."""
        page = history_page(self._context.studio.output_dir, number)
        files = [str(file) for file in page.files]
        position = f"Page {page.number} of {page.pages}" if files else "No pictures yet"
        return [gr.update(value=files, selected_index=None), files, page.number, position]

    @shows_user_errors
    def recall_chosen(self, selected: str | None, base: str) -> list[Any]:
        """Bring back the settings of the picture whose details are shown."""
        if selected is None:
            raise UserError("choose a picture first")
        file = Path(selected)
        try:
            data = file.read_bytes()
        except OSError as problem:
            raise UserError(f"{file.name} can't be read: {problem.strerror or problem}") from problem
        return self._recalled(self._recall(data, file.name, base), base, selected)

    @shows_user_errors
    def recall_dropped(self, dropped: str | None, base: str) -> list[Any]:
        """Bring back the settings of a picture from anywhere."""
        if dropped is None:
            return [gr.skip()] * (len(self._form.inputs) + 6)
        config, file = self._context.config, Path(dropped)
        data = read_picture(file, file.name, most_bytes=config.max_upload_mb * 2**20, most_pixels=config.max_pixels)
        return self._recalled(self._recall(data, file.name, base), base, None)

    def _recall(self, data: bytes, name: str, base: str) -> Recalled:
        config = self._context.config
        bases = tuple(dict.fromkeys([base, *config.bases]))
        return recall(data, name, self._context.library, bases, config.dtype)

    def _recalled(self, recalled: Recalled, base: str, selected: str | None) -> list[Any]:
        values = recalled.values | {"num_images": 1, "random_seed": False}
        if "seed" in values:
            values["seed"] = str(values["seed"])
        model = [gr.skip()] * 3
        if recalled.base is not None:
            label = self._bases.label(recalled.base)
            status = gr.skip() if recalled.base == base else loads_later(label)
            model = [label, status, recalled.base]
        notes = ", ".join(recalled.notes)
        if notes:
            gr.Warning(html.escape(f"Recalled, but {notes}", quote=False))
        else:
            gr.Info("Recalled. Generate draws this picture again.")
        cards = gr.skip()
        if recalled.cards is not None:
            library, on_mismatch = self._context.library, self._context.studio.on_mismatch
            cards = with_warnings(recalled.cards, library, recalled.base or base, on_mismatch)
        shown = details_value(details_of(recalled.settings), recalled.notes)
        return [*self._form.updates(values), *model, cards, shown, selected]

    def _chosen(self, files: list[str], index: Any) -> tuple[Any, Any]:
        if not isinstance(index, int) or not 0 <= index < len(files):
            return gr.skip(), gr.skip()
        return self._details(Path(files[index])), files[index]

    def _details(self, file: Path) -> dict[str, Any] | None:
        try:
            settings = told_settings(file.read_bytes(), file.name)
        except (OSError, UserError):
            return details_value([("File", file.name)], ["this picture can't be read any more"])
        return details_value([*details_of(settings), ("File", file.name)])

    def _saved(self, saved: list[SavedPicture]) -> str:
        pictures = "1 picture" if len(saved) == 1 else f"{len(saved)} pictures"
        # Others have no business with the folders of this machine.
        folder = plain(self._context.studio.output_dir.as_posix())
        there = "" if self._context.config.open_to_others else f" in {folder}"
        return f"Saved {pictures}{there}, with the settings inside. {words_on(saved)}"
