"""The XY grid of Generate: pictures over two axes, each saved like any other, and a labelled sheet of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from svft_diffusion.app.components.adapter_cards import Card
from svft_diffusion.app.components.choices import new_choices
from svft_diffusion.app.components.drawing_progress import DrawingProgress, drawing_progress, drawing_status
from svft_diffusion.app.components.picture_details import details_value, picture_details
from svft_diffusion.app.components.stopping import stop_button, wire_stop
from svft_diffusion.app.context import QUEUE, AppContext, Shared, shows_user_errors
from svft_diffusion.app.drawing.drawing_series import (
    cards_by_id,
    draw_series,
    label_of,
    refuse_tags,
    save_cells,
    with_weights,
)
from svft_diffusion.app.drawing.gallery import details_of
from svft_diffusion.app.drawing.picture_request import PictureRequest, SavedPicture, words_on
from svft_diffusion.app.tabs import before_after
from svft_diffusion.app.tabs.generate_settings import PictureWishes, SettingsForm
from svft_diffusion.errors import UserError
from svft_diffusion.markdown import plain
from svft_diffusion.sampling.axes import (
    GUIDANCE,
    MOST_CELLS,
    PROMPT,
    REPLACE,
    SCHEDULER,
    SEED,
    STEPS,
    WEIGHT,
    Axis,
    Cell,
    cells_of,
    parse_axis,
)
from svft_diffusion.sampling.png import told_settings

_NOTHING = "nothing"
_TITLES = {
    SEED: "Seed",
    STEPS: "Steps",
    GUIDANCE: "Guidance",
    SCHEDULER: "Scheduler",
    PROMPT: "Prompt, one a line",
    REPLACE: "Words of the prompt, replaced",
}
_EXAMPLES = {WEIGHT: "0, 0.5, 1", SEED: "0:2", STEPS: "5, 10, 25", GUIDANCE: "1:7:3", SCHEDULER: "ddim, euler_a"}
_PLACEHOLDERS = {REPLACE: "words of the prompt, then others: red, blue, green"}

WireRecall = Callable[[gr.Button, gr.State, gr.HTML], None]


@dataclass(frozen=True)
class GridForm:
    """What the grid asks for."""

    across: gr.Dropdown
    across_values: gr.Textbox
    down: gr.Dropdown
    down_values: gr.Textbox

    @property
    def inputs(self) -> list[Any]:
        return [self.across, self.across_values, self.down, self.down_values]


@dataclass(frozen=True)
class GridView:
    """What comes of it."""

    drawing: gr.HTML
    status: gr.Markdown
    cells: gr.Gallery
    files: gr.State  # paths of the cells
    sheet: gr.DownloadButton
    panel: gr.Row  # of the chosen cell
    chosen: gr.Image
    selected: gr.State  # path of the chosen cell, or None
    details: gr.HTML
    recall: gr.Button


def build(context: AppContext, shared: Shared, form: SettingsForm, wire_recall: WireRecall) -> None:
    """Place the accordions of the grid and of the before-and-after slider.

    Args:
        form: of the pictures; cells take from it what no axis sets.
        wire_recall: lets a button bring back the settings of the picture whose path a state holds, and shows them.
    """
    with gr.Accordion("XY grid", open=False, elem_id="grid") as accordion:
        asked = _grid_form()
        plan = gr.Markdown(elem_id="grid-plan")
        with gr.Row():
            draw = gr.Button("Draw the grid", variant="primary", elem_id="grid-draw", scale=3, min_width=140)
            stop = stop_button("grid-stop", draw)
        view = _grid_view()
    before_after.build(context, shared, form)

    page = GridEvents(context)
    private: dict[str, Any] = {"api_visibility": "private"}
    quiet: dict[str, Any] = private | {"show_progress": "hidden"}
    gr.on([accordion.expand, asked.across.focus], page.columns, [shared.cards, asked.across], asked.across, **quiet)
    gr.on([accordion.expand, asked.down.focus], page.rows, [shared.cards, asked.down], asked.down, **quiet)
    for axis, values in ((asked.across, asked.across_values), (asked.down, asked.down_values)):
        axis.input(page.examples, [axis, form.prompt], values, **quiet)
    gr.on(
        [accordion.expand, *(field.change for field in asked.inputs)],
        page.plan,
        [shared.cards, *asked.inputs, *form.inputs],
        plan,
        trigger_mode="always_last",
        **quiet,
    )
    drawn = draw.click(
        page.draw,
        [shared.base, shared.cards, *asked.inputs, *form.inputs],
        [view.drawing, view.status, view.cells, view.files, view.sheet],
        concurrency_id=QUEUE,
        concurrency_limit=1,
        show_progress_on=view.status,
        **private,
    )
    wire_stop(stop, drawn, view.drawing)
    view.cells.select(page.choose, view.files, [view.panel, view.chosen, view.selected, view.details], **quiet)
    wire_recall(view.recall, view.selected, view.details)


def _grid_form() -> GridForm:
    with gr.Row():
        with gr.Column(min_width=280):
            across = gr.Dropdown(_axes(None), value=SEED, label="Columns", elem_id="grid-across")
            across_values = _values_field(_EXAMPLES[SEED], "Values of the columns", "grid-across-values")
        with gr.Column(min_width=280):
            down = gr.Dropdown(_axes_of_rows(None), value=_NOTHING, label="Rows", elem_id="grid-down")
            down_values = _values_field("", "Values of the rows", "grid-down-values")
    return GridForm(across, across_values, down, down_values)


def _values_field(value: str, label: str, elem_id: str) -> gr.Textbox:
    return gr.Textbox(
        value,
        label=label,
        info="A list such as 0, 0.5, 1, a range such as 0:1:0.25, or both",
        max_lines=8,
        max_length=10_000,
        elem_id=elem_id,
    )


def _grid_view() -> GridView:
    drawing = drawing_progress("grid-drawing")
    status = drawing_status("grid-status")
    cells = gr.Gallery(
        label="Cells",
        format="png",  # files go out as they were saved, with the settings inside
        object_fit="contain",
        height="auto",
        interactive=False,
        allow_preview=False,
        visible=False,
        elem_id="grid-cells",
    )
    sheet = gr.DownloadButton("Download the labelled sheet", visible=False, size="md", elem_id="grid-sheet")
    with gr.Row(visible=False) as panel:
        chosen = gr.Image(
            label="Chosen cell",
            format="png",
            interactive=False,
            buttons=["download", "fullscreen"],
            min_width=280,
            elem_id="grid-chosen",
        )
        with gr.Column(min_width=280):
            details = picture_details("grid-details")
            recall = gr.Button("Recall these settings", size="md", elem_id="grid-recall")
    return GridView(drawing, status, cells, gr.State([]), sheet, panel, chosen, gr.State(None), details, recall)


class GridEvents:
    """What happens when something in the accordion is used."""

    def __init__(self, context: AppContext) -> None:
        self._context = context

    def columns(self, cards: object, chosen: str | None) -> Any:
        """The axes of the columns, with the adapters that are on cards now."""
        return new_choices(_axes(cards), chosen, SEED)

    def rows(self, cards: object, chosen: str | None) -> Any:
        """The axes of the rows."""
        return new_choices(_axes_of_rows(cards), chosen, _NOTHING)

    def examples(self, axis: str | None, prompt: str) -> Any:
        """Values to begin with."""
        kind = _kind_of(axis)
        value = f"{prompt}\n" if kind == PROMPT else _EXAMPLES.get(kind, "")
        return gr.update(value=value, placeholder=_PLACEHOLDERS.get(kind, ""), lines=3 if kind == PROMPT else 1)

    def plan(self, cards: object, across: str, across_text: str, down: str, down_text: str, *values: Any) -> str:
        """How many pictures that would be, or what is wrong."""
        try:
            axes = _read_axes(cards, across, across_text, down, down_text)
            wishes = PictureWishes(*values)
            cells = cells_of(axes, wishes.prompt or "")
        except UserError as problem:
            return f"Not yet: {plain(str(problem))}."
        columns, rows = len(axes[0].values), len(axes[1].values) if len(axes) > 1 else 1
        steps = sum(cell.settings.get(STEPS, wishes.num_inference_steps or 0) for cell in cells)
        pictures = "1 picture" if len(cells) == 1 else f"{len(cells)} pictures"
        return f"{columns} x {rows}: {pictures} of at most {MOST_CELLS}, {int(steps)} steps in all."

    @shows_user_errors
    def draw(
        self,
        base: str,
        cards: object,
        across: str,
        across_text: str,
        down: str,
        down_text: str,
        *values: Any,
    ) -> Iterator[list[Any]]:
        """Draw and save the cells, and show them while they come. Closing it ends the drawing within a step."""
        axes = _read_axes(cards, across, across_text, down, down_text)
        wishes = replace(PictureWishes(*values).with_seed(), num_images=1, random_seed=False)
        cells = cells_of(axes, wishes.prompt or "")
        requests = [self._request(wishes, cell, base, cards) for cell in cells]
        progress = DrawingProgress(len(requests), [request.num_inference_steps for request in requests])
        stay = gr.skip()
        yield [progress.started(), "", stay, stay, gr.update(visible=False)]
        shown: list[tuple[str, str]] = []
        saved: list[SavedPicture] = []
        with closing(draw_series(self._context.studio, requests)) as events:
            for event in events:
                if isinstance(event, SavedPicture):
                    shown.append((str(event.path), cells[len(saved)].label))
                    saved.append(event)
                    gallery = gr.update(value=shown, visible=True, columns=len(axes[0].values), selected_index=None)
                    yield [stay, stay, gallery, [file for file, _ in shown], stay]
                elif (value := progress.after(event)) is not None:
                    yield [value, *[stay] * 4]
        sheet = save_cells(self._context.studio.output_dir, cells, saved, axes)
        # Others have no business with the folders of this machine.
        there = "" if self._context.config.open_to_others else f": {plain(sheet.as_posix())}"
        status = f"Saved {len(saved)} pictures, and a labelled sheet of them{there}. {words_on(saved)}"
        yield [stay, status, stay, stay, gr.update(value=str(sheet), visible=True)]

    def choose(self, files: list[str], event: gr.SelectData) -> tuple[Any, ...]:
        """Show a cell, and how it was made."""
        if not isinstance(event.index, int) or not 0 <= event.index < len(files):
            return (gr.skip(),) * 4
        file = Path(files[event.index])
        try:
            settings = told_settings(file.read_bytes(), file.name)
        except (OSError, UserError):
            return gr.Row(visible=True), None, None, details_value([], ["this picture can't be read any more"])
        details = details_value([*details_of(settings), ("File", file.name)])
        return gr.Row(visible=True), str(file), str(file), details

    def _request(self, wishes: PictureWishes, cell: Cell, base: str, cards: object) -> PictureRequest:
        settings = {name: str(value) if name == SEED else value for name, value in cell.settings.items()}
        wishes = replace(wishes, **settings)  # type: ignore[arg-type]
        refuse_tags(wishes.prompt or "", [card for id, card in cards_by_id(cards).items() if id in cell.weights])
        library, on_mismatch = self._context.library, self._context.studio.on_mismatch
        return wishes.request(base, with_weights(cards, cell.weights), library, on_mismatch)


def _axes(cards: object) -> list[tuple[str, str]]:
    """What an axis can be: labels, and what handlers are given."""
    weights = [(f"Weight of {label_of(card)}", f"{WEIGHT}:{id}") for id, card in cards_by_id(cards).items()]
    return [*weights, *((title, kind) for kind, title in _TITLES.items())]


def _axes_of_rows(cards: object) -> list[tuple[str, str]]:
    return [("Nothing: one row", _NOTHING), *_axes(cards)]


def _kind_of(axis: str | None) -> str:
    return (axis or _NOTHING).partition(":")[0]


def _read_axes(cards: object, across: str | None, across_text: str, down: str | None, down_text: str) -> list[Axis]:
    """The axes that the form asks for.

    Raises:
        UserError: see `svft_diffusion.sampling.axes.parse_axis`; or an adapter that is on no card.
    """
    axes = [_read_axis(cards, "columns", across, across_text)]
    return axes if _kind_of(down) == _NOTHING else [*axes, _read_axis(cards, "rows", down, down_text)]


def _read_axis(cards: object, side: str, axis: str | None, text: str) -> Axis:
    kind, _, id = (axis or _NOTHING).partition(":")
    card: Card = {}
    if kind == WEIGHT:
        card = cards_by_id(cards).get(id, {})
        if not card:
            raise UserError(f"{side}: this adapter is no longer on the cards; choose again")
    elif kind not in _TITLES:
        raise UserError(f"choose what the {side} are")
    try:
        return parse_axis(kind, text or "", of=id, name=str(card.get("name", "")))
    except UserError as problem:
        raise UserError(f"{side}: {problem}") from None
