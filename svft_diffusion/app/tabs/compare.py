"""Compare: two sides on the same seeds, and how well the adapters of a training do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from svft_diffusion.app.components.adapter_cards import with_card
from svft_diffusion.app.components.choices import new_choices
from svft_diffusion.app.components.drawing_progress import DrawingProgress, drawing_progress, drawing_status
from svft_diffusion.app.components.prompt_following import follow_prompt
from svft_diffusion.app.components.stopping import stop_button, wire_stop
from svft_diffusion.app.context import QUEUE, AppContext, Shared, shows_user_errors
from svft_diffusion.app.drawing.drawing_series import draw_series
from svft_diffusion.app.drawing.picture_request import PictureRequest, SavedPicture
from svft_diffusion.app.shelf.uploads import called
from svft_diffusion.app.tabs import evaluation
from svft_diffusion.app.tabs.generate_settings import PictureWishes
from svft_diffusion.errors import UserError
from svft_diffusion.sampling.axes import whole_numbers_in
from svft_diffusion.sampling.difference import difference
from svft_diffusion.sampling.png import read_png
from svft_diffusion.sampling.prompt_syntax import split_prompt

MOST_SEEDS = 8
_BASE, _CARDS = "base", "cards"
_OWN_SIDES = [("The base model alone", _BASE), ("The cards of Generate, as they are", _CARDS)]

Pairs = list[tuple[str, str, str]]
"""Seed, as text since a script can't hold every one as a number, and the paths of the pictures of both sides."""


@dataclass(frozen=True)
class Side:
    """What acts on one side."""

    choice: gr.Dropdown
    strength: gr.Number

    @property
    def inputs(self) -> list[Any]:
        return [self.choice, self.strength]


@dataclass(frozen=True)
class ComparisonForm:
    """What is drawn on both sides."""

    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    seeds: gr.Textbox
    steps: gr.Number
    guidance: gr.Number

    @property
    def inputs(self) -> list[Any]:
        return [self.prompt, self.negative_prompt, self.seeds, self.steps, self.guidance]


@dataclass(frozen=True)
class ComparisonView:
    """What comes of it."""

    status: gr.Markdown
    drawing: gr.HTML
    gallery: gr.Gallery
    pairs: gr.State  # Pairs
    seed: gr.Radio
    slider: gr.ImageSlider
    difference: gr.Image
    said: gr.Markdown

    @property
    def closely(self) -> list[Any]:
        """What shows one pair, in the order in which handlers give it."""
        return [self.seed, self.slider, self.difference, self.said]


def build(context: AppContext, shared: Shared) -> None:
    """Place the tab."""
    gr.Markdown("## Two sides on the same seeds")
    with gr.Row():
        left = _side("A", _BASE, "compare-a")
        right = _side("B", _CARDS, "compare-b")
    form = _form()
    with gr.Row():
        draw = gr.Button("Compare", variant="primary", elem_id="compare-draw", scale=3, min_width=140)
        stop = stop_button("compare-stop", draw)
    view = _view()
    evaluation.build(context, shared)

    page = CompareEvents(context)
    private: dict[str, Any] = {"api_visibility": "private"}
    quiet: dict[str, Any] = private | {"show_progress": "hidden"}
    for side in (left, right):
        gr.on([shared.tab.select, side.choice.focus], page.sides, side.choice, side.choice, **quiet)
        side.choice.input(page.strength_of, side.choice, side.strength, **quiet)
    drawn = draw.click(
        page.draw,
        [shared.base, shared.cards, *left.inputs, *right.inputs, *form.inputs],
        [view.drawing, view.gallery, view.pairs, *view.closely],
        concurrency_id=QUEUE,
        concurrency_limit=1,
        show_progress_on=view.status,
        **private,
    )
    wire_stop(stop, drawn, view.drawing)
    follow_prompt(shared.tabs, form.prompt, "compare")
    view.seed.input(page.look_at, [view.pairs, view.seed], view.closely, **quiet)
    view.gallery.select(page.choose, view.pairs, view.closely, **quiet)


def _side(name: str, chosen: str, elem_id: str) -> Side:
    with gr.Column(min_width=280), gr.Group():
        choice = gr.Dropdown(_OWN_SIDES, value=chosen, label=f"Side {name}", elem_id=elem_id)
        strength = gr.Number(
            1.0,
            label=f"Strength on side {name}",
            step=0.05,
            visible=False,
            elem_id=f"{elem_id}-strength",
        )
    return Side(choice, strength)


def _form() -> ComparisonForm:
    usual = PictureRequest(base="", prompt="")
    narrow: dict[str, Any] = {"min_width": 130}
    prompt = gr.Textbox(
        label="Prompt", placeholder="a photo of a red robot on the beach", lines=2, elem_id="compare-prompt"
    )
    with gr.Row(equal_height=True):
        negative_prompt = gr.Textbox(label="Negative prompt", elem_id="compare-negative-prompt", scale=2, **narrow)
        seeds = gr.Textbox("0", label="Seeds, such as 0, 7 or 0:3", max_length=1000, elem_id="compare-seeds", **narrow)
        steps = gr.Number(usual.num_inference_steps, label="Steps", precision=0, elem_id="compare-steps", **narrow)
        guidance = gr.Number(usual.guidance_scale, label="Guidance", step=0.5, elem_id="compare-guidance", **narrow)
    return ComparisonForm(prompt, negative_prompt, seeds, steps, guidance)


def _view() -> ComparisonView:
    status = drawing_status("compare-status")
    drawing = drawing_progress("compare-drawing")
    gallery = gr.Gallery(
        label="A and B",
        format="png",  # files go out as they were saved, with the settings inside
        columns=2,
        height="auto",
        object_fit="contain",
        interactive=False,
        allow_preview=False,
        visible=False,
        elem_id="compare-pictures",
    )
    seed = gr.Radio([], label="Look closely at seed", visible=False, elem_id="compare-seed")
    with gr.Row():
        slider = gr.ImageSlider(
            label="A, left, and B, right",
            format="png",
            type="filepath",
            interactive=False,
            visible=False,
            max_height=640,
            min_width=280,
            elem_id="compare-slider",
        )
        with gr.Column(min_width=280):
            apart = gr.Image(
                label="Difference",
                format="png",
                interactive=False,
                visible=False,
                buttons=["download", "fullscreen"],
                elem_id="compare-difference",
            )
            said = gr.Markdown(elem_id="compare-pair")
    return ComparisonView(status, drawing, gallery, gr.State([]), seed, slider, apart, said)


class CompareEvents:
    """What happens when something in the upper part of the tab is used."""

    def __init__(self, context: AppContext) -> None:
        self._context = context

    def sides(self, chosen: str | None) -> Any:
        """What a side can be now."""
        choices = [*_OWN_SIDES, *((entry.label, entry.id) for entry in self._context.library.entries())]
        return new_choices(choices, chosen, _BASE)

    @shows_user_errors
    def strength_of(self, chosen: str | None) -> Any:
        """The strength that an adapter suggests; the other sides have none."""
        if chosen in (None, _BASE, _CARDS):
            return gr.update(visible=False)
        return gr.update(value=self._context.library.get(str(chosen)).header.suggested_strength, visible=True)

    @shows_user_errors
    def draw(
        self,
        base: str,
        cards: object,
        left: str | None,
        left_strength: float | None,
        right: str | None,
        right_strength: float | None,
        prompt: str,
        negative_prompt: str,
        seeds: str,
        steps: int | None,
        guidance: float | None,
    ) -> Iterator[list[Any]]:
        """Draw and save both sides, and show them while they come. Closing it ends the drawing within a step."""
        if split_prompt(prompt or "")[1]:
            raise UserError("choose adapters as sides; a prompt that names them would let them act on both")
        numbers = list(dict.fromkeys(whole_numbers_in(seeds or "")))
        if not 1 <= len(numbers) <= MOST_SEEDS:
            raise UserError(f"give one to {MOST_SEEDS} seeds, such as 0, 7 or 0:3")
        sides = [self._side(left, left_strength, cards), self._side(right, right_strength, cards)]
        library, studio = self._context.library, self._context.studio
        requests = [
            PictureWishes(
                prompt, negative_prompt, str(seed), False, 1, steps, guidance, width=None, height=None, scheduler=None
            ).request(base, side, library, studio.on_mismatch)
            for seed in numbers
            for side in sides
        ]
        progress = DrawingProgress(len(requests), [request.num_inference_steps for request in requests])
        stay = gr.skip()
        yield [progress.started(), *[stay] * 6]
        shown: list[tuple[str, str]] = []
        pairs: Pairs = []
        with closing(draw_series(studio, requests)) as events:
            for event in events:
                if isinstance(event, SavedPicture):
                    shown.append((str(event.path), f"{'AB'[len(shown) % 2]}, seed {event.seed}"))
                    closely = [stay] * 4
                    if len(shown) % 2 == 0:
                        pairs.append((str(event.seed), shown[-2][0], shown[-1][0]))
                        closely = _look(pairs, pairs[-1])
                    gallery = gr.update(value=shown, visible=True, selected_index=None)
                    yield [stay, gallery, pairs, *closely]
                elif (value := progress.after(event)) is not None:
                    yield [value, *[stay] * 6]

    @shows_user_errors
    def look_at(self, pairs: Pairs, seed: str | None) -> list[Any]:
        """Both pictures of a seed over each other, and their difference."""
        pair = next((pair for pair in pairs if pair[0] == seed), None)
        return [gr.skip()] * 4 if pair is None else _look(pairs, pair)

    @shows_user_errors
    def choose(self, pairs: Pairs, event: gr.SelectData) -> list[Any]:
        """The pair of the picture that was pressed."""
        number = event.index // 2 if isinstance(event.index, int) else -1
        return _look(pairs, pairs[number]) if 0 <= number < len(pairs) else [gr.skip()] * 4

    def _side(self, chosen: str | None, strength: float | None, cards: object) -> object:
        """The cards that act on a side."""
        if chosen == _CARDS:
            return cards
        if chosen in (None, _BASE):
            return []
        if strength is None:
            raise UserError("the strength is missing; fill it in")
        return with_card([], self._context.library.get(str(chosen)), strength)


def _look(pairs: Pairs, pair: tuple[str, str, str]) -> list[Any]:
    """What shows a pair, see `ComparisonView.closely`.

    Raises:
        UserError: a picture of it is gone.
    """
    seed, *files = pair
    pictures = []
    hidden = []
    for side, file in zip("AB", map(Path, files), strict=True):
        with called(file.name, file):
            picture, settings = read_png(file)
        pictures.append(picture)
        hidden += [side] if settings.get("blacked_out") is True else []
    apart = difference(*pictures)
    label = f"Difference, {apart.factor} times" if apart.factor > 1 else "Difference"
    text = f"Seed {seed}: A and B differ by {apart.mean:.1%} on average, by {apart.largest:.0%} at most."
    if apart.largest == 0:
        text = f"Seed {seed}: A and B are the same, bit for bit."
    if hidden:
        text += f" {' and '.join(hidden)} {'were' if len(hidden) > 1 else 'was'} blacked out by the safety checker."
    return [
        gr.update(choices=[one[0] for one in pairs], value=seed, visible=True),
        gr.update(value=tuple(files), visible=True),
        gr.update(value=apart.image, label=label, visible=True),
        text,
    ]
