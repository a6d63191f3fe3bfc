"""Several requests, drawn one after the other: the cells of a grid, and the sides of a comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from svft_diffusion.app.components.adapter_cards import Card
from svft_diffusion.app.drawing.picture_request import PictureRequest, SavedPicture, Step, check_request
from svft_diffusion.app.drawing.studio import Drawing, Studio
from svft_diffusion.app.shelf.uploads import called
from svft_diffusion.errors import UserError
from svft_diffusion.sampling.axes import Axis, Cell
from svft_diffusion.sampling.overview import save_sheet
from svft_diffusion.sampling.prompt_syntax import split_prompt

SHEETS_FOLDER = "grids"
_DIGITS = 10  # after the point: 0.8 x 0.7 is 0.56, and not 0.5599999999999999


def draw_series(studio: Studio, requests: Sequence[PictureRequest]) -> Drawing:
    """Draw requests for one picture each, in their order; a step's picture is the number of the request.

    All requests are checked before anything is drawn. Closing the iterator ends the drawing at its next step.

    Raises:
        UserError: as `Studio.draw`.
    """
    for request in requests:
        check_request(request)
    for number, request in enumerate(requests):
        with closing(studio.draw(request, previews=True)) as events:
            for event in events:
                yield dataclasses.replace(event, picture=number) if isinstance(event, Step) else event


def cards_by_id(cards: object) -> dict[str, Card]:
    """The cards of a visitor by the ids of their adapters; what is no card is not among them."""
    given = cards if isinstance(cards, list) else []
    return {str(card.get("id")): card for card in given if isinstance(card, dict)}


def label_of(card: Card) -> str:
    """What lists call the adapter of a card: as `LibraryEntry.label`."""
    title, name = card.get("title"), card.get("name")
    return f"{title} ({name})" if title and title != name else str(name)


def refuse_tags(prompt: str, cards: Iterable[Card]) -> None:
    """Refuse a prompt that gives adapters weights by itself which are to change.

    Raises:
        UserError: names the first of them.
    """
    named = {str(card.get("name")) for card in cards} & set(split_prompt(prompt)[1])
    if named:
        raise UserError(f"the prompt gives {min(named)} a weight of its own; take <adapter:{min(named)}> out of it")


def with_weights(cards: object, weights: Mapping[str, float]) -> list[Card]:
    """The cards, those of ``weights`` (id -> weight) on and at that weight.

    Raises:
        UserError: one of them is not there.
    """
    given = cards_by_id(cards)
    if weights.keys() - given.keys():
        raise UserError("this adapter is no longer on the cards; choose again")
    return [{**card, "weight": weights[id], "on": True} if id in weights else card for id, card in given.items()]


def with_factor(cards: object, factor: float) -> list[Card]:
    """The cards with every weight multiplied, where it is a number."""
    return [
        {**card, "weight": round(card["weight"] * factor, _DIGITS)}
        if isinstance(card.get("weight"), int | float)
        else card
        for card in cards_by_id(cards).values()
    ]


def save_cells(folder: Path, cells: Sequence[Cell], pictures: Sequence[SavedPicture], axes: Sequence[Axis]) -> Path:
    """Write the labelled sheet of a grid into `SHEETS_FOLDER` below ``folder``, named after its first picture.

    Raises:
        UserError: it can't be written, or a picture is gone.
    """
    columns = axes[0].labels
    rows = axes[1].labels if len(axes) > 1 else [""]
    placed: list[list[Path | None]] = [[None] * len(columns) for _ in rows]
    for cell, picture in zip(cells, pictures, strict=True):
        placed[cell.row][cell.column] = picture.path
    first = pictures[0].path
    file, number = folder / SHEETS_FOLDER / first.name, 2
    while file.exists():  # numbers of pictures come again when the pictures are gone; an older sheet stays
        file, number = file.with_name(f"{first.stem}_{number}.png"), number + 1
    with called(file.name, file), called(first.name, first):
        return save_sheet(file, placed, rows, columns)
