"""Names in plots: each near its point, none over another."""

from __future__ import annotations

import itertools
import random

import pytest

from svft_diffusion.comparison.plots import free_places


@pytest.mark.parametrize("spread", [5.0, 60.0, 400.0])
def test_names_cover_neither_each_other_nor_points(spread: float) -> None:
    numbers = random.Random(0)
    points = [(500 + spread * numbers.random(), 500 + spread * numbers.random()) for _ in range(20)]
    widths = [numbers.uniform(20, 90) for _ in points]
    places = free_places(points, widths, 10)
    boxes = [(x, y, x + width, y + 10) for (x, y), width in zip(places, widths, strict=True)]
    for (left, low, right, high), (other, lowest, furthest, highest) in itertools.combinations(boxes, 2):
        assert left >= furthest or other >= right or low >= highest or lowest >= high
    for left, low, right, high in boxes:
        assert not any(left < x < right and low < y < high for x, y in points)


def test_a_name_with_room_stands_right_of_its_point() -> None:
    assert free_places([(0, 0), (0, 100)], [30, 30], 10) == [(5, -4), (5, 96)]


def test_a_name_without_any_room_stays_at_its_point() -> None:
    points = [(0.0, 5.0 * number) for number in range(-200, 200)]
    places = free_places([*points, (1.0, 0.0)], [400.0] * 401, 10)
    assert places[-1] == (6.0, -4.0)
