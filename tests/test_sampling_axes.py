"""Axes of a grid: what is typed becomes values, exactly, and cells become settings."""

from __future__ import annotations

import numpy
import pytest
from PIL import Image

from svft_diffusion.errors import UserError
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
    cells_of,
    numbers_in,
    parse_axis,
    whole_numbers_in,
)
from svft_diffusion.sampling.difference import difference


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0, 0.5, 1", [0, 0.5, 1]),
        ("0:1:0.25", [0, 0.25, 0.5, 0.75, 1]),
        ("0:1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        (" 3:1 ", [3, 2, 1]),
        ("1:-1:-0.5, 2\n3,", [1, 0.5, 0, -0.5, -1, 2, 3]),
        ("0:1:0.4", [0, 0.4, 0.8]),
        ("-0, 1e1", [0, 10]),
        ("2:2", [2]),
    ],
)
def test_lists_and_ranges_are_exact(text: str, numbers: list[float]) -> None:
    found = numbers_in(text)
    assert found == numbers and all(type(number) is float for number in found)
    assert "-0.0" not in map(repr, found)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a", "'a' is neither a number nor a range such as 0:1:0.25"),
        ("nan", "neither a number"),
        ("inf", "neither a number"),
        ("0:inf", "neither a number"),
        ("1e400", "neither a number"),
        ("0:1:1e-400", "neither a number"),
        ("0:1:0", "its step must not be 0"),
        ("0:1:-1", "change the sign of its step"),
        ("0:1:2:3", "is no range"),
        ("0:", "neither a number"),
        ("0:1e18", "more than 36 pictures"),
        ("0:1:0.000001", "more than 36 pictures"),
        (", ".join(map(str, range(37))), "more than 36 pictures"),
        ("x" * 1000, r"'x+\.\.\.' is neither"),
    ],
)
def test_what_is_no_list_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        numbers_in(text)
    assert len(str(caught.value)) < 160


def test_whole_numbers_stay_whole() -> None:
    assert whole_numbers_in("9223372036854775807, 0:2") == [9223372036854775807, 0, 1, 2]
    with pytest.raises(UserError, match=r"0\.5 is no whole number"):
        whole_numbers_in("0:1:0.5")


def test_kinds_of_axes() -> None:
    assert parse_axis(WEIGHT, "0:1:0.5", of="id", name="dog").labels == ["dog 0", "dog 0.5", "dog 1"]
    assert parse_axis(SEED, "3, 3, 1").values == (3, 1)
    assert parse_axis(GUIDANCE, "7.5").labels == ["guidance 7.5"]
    assert parse_axis(SCHEDULER, "DPM++ 2M Karras, ddim").values == ("dpm++_2m_karras", "ddim")
    assert parse_axis(PROMPT, "a dog, red\n\n a cat \n").values == ("a dog, red", "a cat")
    replaced = parse_axis(REPLACE, '"red, white", blue, green')
    assert (replaced.of, replaced.values) == ("red, white", ("red, white", "blue", "green"))
    for kind, text, reason in (
        (SEED, "", "no values"),
        (PROMPT, " \n ", "no values"),
        (REPLACE, "red", "give those of the prompt first"),
        (REPLACE, 'red, "blue', "a quote is not closed"),
        (SCHEDULER, "eular", "unknown scheduler 'eular'"),
        (PROMPT, "\n".join(map(str, range(40))), "more than 36"),
    ):
        with pytest.raises(UserError, match=reason):
            parse_axis(kind, text)


def test_cells_go_row_by_row_and_hold_what_differs() -> None:
    across, down = parse_axis(WEIGHT, "0, 1", of="id", name="dog"), parse_axis(STEPS, "2, 4, 6")
    cells = cells_of([across, down], "a dog")
    assert [(cell.row, cell.column) for cell in cells] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert cells[3].settings == {STEPS: 4} and cells[3].weights == {"id": 1.0}
    assert cells[3].label == "dog 1, steps 4"
    assert [cell.settings for cell in cells_of([down], "a dog")] == [{STEPS: 2}, {STEPS: 4}, {STEPS: 6}]


@pytest.mark.parametrize("turned", [False, True])
def test_prompts_are_put_in_before_their_words_are_replaced(turned: bool) -> None:
    axes = [parse_axis(REPLACE, "red, blue"), parse_axis(PROMPT, "a red dog\nthe red and red cat")]
    cells = cells_of(axes[::-1] if turned else axes, "no matter")
    assert {cell.settings["prompt"] for cell in cells} == {
        "a red dog", "a blue dog", "the red and red cat", "the blue and blue cat"
    }  # fmt: skip
    two_words = cells_of([parse_axis(REPLACE, "red, blue"), parse_axis(REPLACE, "dog, cat")], "a red dog")
    assert [cell.settings["prompt"] for cell in two_words] == ["a red dog", "a blue dog", "a red cat", "a blue cat"]
    with pytest.raises(UserError, match="the prompt 'a dog' does not hold 'red'"):
        cells_of([axes[0]], "a dog")


def test_too_many_cells_and_the_same_axis_twice_are_refused() -> None:
    six, seven = Axis(SEED, tuple(range(6))), Axis(STEPS, tuple(range(1, 8)))
    assert len(cells_of([six, Axis(STEPS, seven.values[:6])], "")) == MOST_CELLS
    with pytest.raises(UserError, match="more than 36"):
        cells_of([six, seven], "")
    with pytest.raises(UserError, match="both axes are the same"):
        cells_of([six, six], "")


def test_differences_of_pictures() -> None:
    pixels = numpy.full((3, 5, 3), 100, dtype=numpy.uint8)
    first = Image.fromarray(pixels)
    pixels[1, 4] = (90, 100, 150)
    apart = difference(first, Image.fromarray(pixels))
    assert (apart.factor, apart.largest) == (5, 50 / 255)
    assert apart.mean == pytest.approx(60 / 45 / 255)
    assert apart.image.size == (5, 3) and apart.image.getpixel((4, 1)) == (50, 0, 250)
    assert apart.image.getpixel((0, 0)) == (0, 0, 0)
    same = difference(first, first)
    assert (same.factor, same.mean, same.largest) == (1, 0, 0) and same.image.getextrema() == ((0, 0),) * 3
    with pytest.raises(UserError, match="5 x 3 and 3 x 5"):
        difference(first, first.rotate(90, expand=True))
