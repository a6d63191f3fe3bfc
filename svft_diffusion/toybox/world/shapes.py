"""What each class looks like: a list of coloured polygons from an individual's colours and proportions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from svft_diffusion.toybox.world.geometry import Polygon, box, ellipse, emblem_polygon, polygon, rounded_box
from svft_diffusion.toybox.world.individuals import Individual
from svft_diffusion.toybox.world.vocabulary import Colour

EYE_WHITE: Colour = (250, 250, 250)
INK: Colour = (25, 25, 30)
GLASS: Colour = (190, 225, 240)
LAMP: Colour = (255, 240, 150)
FLAME: Colour = (250, 160, 40)


@dataclass(frozen=True)
class Part:
    """One polygon; ``colour`` ``None`` cuts a hole; only ``patterned`` parts carry the individual's pattern."""

    outline: Polygon
    colour: Colour | None
    patterned: bool = False


@dataclass(frozen=True)
class Figure:
    """Parts from back to front, the emblem's place (x, y, half-size), and the point a hat sits on."""

    parts: list[Part]
    emblem_place: tuple[float, float, float]
    hat_place: tuple[float, float]


def figure(individual: Individual) -> Figure:
    """The drawing of an individual in object coordinates."""
    return _DRAWINGS[individual.class_name](individual)


def _between(individual: Individual, index: int, low: float, high: float) -> float:
    return low + (high - low) * individual.proportions[index]


def _robot(toy: Individual) -> Figure:
    width, head, arms = _between(toy, 0, 0.38, 0.58), _between(toy, 1, 0.28, 0.48), _between(toy, 2, 0.0, 0.5)
    shape = toy.proportions
    parts = []
    for side in (-1, 1):
        parts.append(Part(rounded_box(side * 0.28 - 0.12, 0.5, side * 0.28 + 0.12, 1.0), toy.parts))
        left, right = sorted((side * width, side * (width + 0.22)))
        parts.append(Part(rounded_box(left, -0.15, right, 0.3 + arms * 0.5), toy.parts))
    parts.append(Part(rounded_box(-width, -0.22, width, 0.62), toy.body, patterned=True))
    if shape[3] < 0.5:
        parts.append(Part(box(-0.04, -0.95, 0.04, -0.7), toy.details))
        parts.append(Part(ellipse(0, -0.98, 0.1, 0.1), toy.details))
    else:
        parts += [Part(ellipse(side * head, -0.55, 0.12, 0.12), toy.details) for side in (-1, 1)]
    head_colour = toy.parts if shape[4] > 0.65 else toy.body
    parts.append(Part(ellipse(0, -0.52, head, 0.3, points=32, exponent=2 if shape[4] < 0.35 else 6), head_colour))
    if shape[5] < 0.4:
        parts.append(Part(rounded_box(-head * 0.7, -0.62, head * 0.7, -0.45), INK))
        parts += [Part(ellipse(side * head * 0.35, -0.53, 0.07, 0.07), toy.details) for side in (-1, 1)]
    else:
        for side in (-1, 1):
            parts.append(Part(ellipse(side * head * 0.45, -0.55, 0.12, 0.12), EYE_WHITE))
            parts.append(Part(ellipse(side * head * 0.45, -0.55, 0.06, 0.06), INK))
    return Figure(parts, (0, 0.2, 0.24), (0, -0.8))


def _car(toy: Individual) -> Figure:
    height, cabin, offset = _between(toy, 0, 0.25, 0.45), _between(toy, 1, 0.4, 0.65), _between(toy, 2, -0.15, 0.15)
    roof, window = -0.25 - height, -0.18 - height
    parts = [
        Part(
            polygon(
                (offset - cabin, 0.02),
                (offset - cabin * 0.65, roof),
                (offset + cabin * 0.65, roof),
                (offset + cabin, 0.02),
            ),
            toy.parts,
        ),
        Part(
            polygon(
                (offset - cabin * 0.8, -0.02),
                (offset - cabin * 0.55, window),
                (offset - 0.04, window),
                (offset - 0.04, -0.02),
            ),
            GLASS,
        ),
        Part(
            polygon(
                (offset + 0.04, -0.02),
                (offset + 0.04, window),
                (offset + cabin * 0.55, window),
                (offset + cabin * 0.8, -0.02),
            ),
            GLASS,
        ),
        Part(rounded_box(-1, -0.05, 1, 0.45), toy.body, patterned=True),
        Part(ellipse(0.88, 0.12, 0.1, 0.1), LAMP),
    ]
    wheel = _between(toy, 3, 0.2, 0.29)
    for x in (-0.55, 0.55):
        parts.append(Part(ellipse(x, 0.45, wheel, wheel), INK))
        parts.append(Part(ellipse(x, 0.45, wheel * 0.5, wheel * 0.5), toy.details))
    return Figure(parts, (0, 0.18, 0.2), (offset, roof))


def _house(toy: Individual) -> Figure:
    width, roof = _between(toy, 0, 0.55, 0.8), _between(toy, 1, 0.35, 0.6)
    parts = []
    if toy.proportions[2] < 0.6:
        parts.append(Part(box(width * 0.35, -0.2 - roof, width * 0.62, -0.1), toy.details))
    parts.append(Part(box(-width, -0.2, width, 0.85), toy.body, patterned=True))
    parts.append(Part(polygon((-width - 0.15, -0.17), (0, -0.25 - roof), (width + 0.15, -0.17)), toy.parts))
    door = -0.28 if toy.proportions[3] < 0.5 else 0.28
    parts.append(Part(box(door - 0.15, 0.3, door + 0.15, 0.85), toy.details))
    parts.append(Part(box(-door - 0.17, 0.15, -door + 0.17, 0.5), (250, 240, 170)))
    return Figure(parts, (0, -0.02, 0.15), (0, -0.25 - roof))


def _tree(toy: Individual) -> Figure:
    trunk = _between(toy, 0, 0.1, 0.2)
    parts = [Part(rounded_box(-trunk, 0.1, trunk, 1), toy.parts)]
    if toy.proportions[1] < 0.5:
        crown = _between(toy, 2, 0.5, 0.7)
        parts.append(Part(ellipse(0, -0.3, crown, crown * 0.95), toy.body, patterned=True))
        fruits = [(-0.3, -0.45), (0.25, -0.55), (0.05, -0.1), (0.35, -0.15)][: 1 + int(toy.proportions[3] * 4)]
        parts += [Part(ellipse(x, y, 0.1, 0.1), toy.details) for x, y in fruits]
    else:
        for tier in range(3):
            base, half = 0.3 - tier * 0.38, 0.7 - tier * 0.17
            parts.append(Part(polygon((-half, base), (0, base - 0.62), (half, base)), toy.body, patterned=True))
        if toy.proportions[3] < 0.5:
            parts.append(Part(emblem_polygon("star", 0, -1.05, 0.17), toy.details))
    return Figure(parts, (0, -0.3, 0.2), (0, -0.98))


def _fish(toy: Individual) -> Figure:
    height = _between(toy, 0, 0.38, 0.6)
    fin = -height - _between(toy, 1, 0.15, 0.4)
    parts = [
        Part(polygon((-0.5, 0), (-1.0, -0.45), (-0.88, 0), (-1.0, 0.45)), toy.parts),
        Part(polygon((-0.3, -height * 0.7), (0.0, fin), (0.3, -height * 0.7)), toy.parts),
        Part(ellipse(0.1, 0, 0.75, height), toy.body, patterned=True),
    ]
    if toy.proportions[2] < 0.6:
        parts.append(Part(ellipse(0.05, 0.12, 0.2, 0.11), toy.details))
    parts += [Part(ellipse(0.55, -0.1, 0.13, 0.13), EYE_WHITE), Part(ellipse(0.57, -0.1, 0.07, 0.07), INK)]
    return Figure(parts, (0.0, 0.0, 0.2), (0.1, -height))


def _mug(toy: Individual) -> Figure:
    width, height = _between(toy, 0, 0.42, 0.6), _between(toy, 1, 0.5, 0.7)
    parts = [
        Part(ellipse(width + 0.08, 0.05, 0.32, 0.36), toy.parts),
        Part(ellipse(width + 0.08, 0.05, 0.18, 0.22), None),
        Part(rounded_box(-width, -height, width, height), toy.body, patterned=True),
        Part(rounded_box(-width, -height, width, -height + 0.2), toy.parts),
    ]
    if toy.proportions[2] < 0.5:
        parts.append(Part(rounded_box(-width, height - 0.2, width, height), toy.details))
    return Figure(parts, (0, 0.05, 0.27), (0, -height))


def _teddy(toy: Individual) -> Figure:
    ear, belly = _between(toy, 0, 0.14, 0.22), _between(toy, 1, 0.42, 0.58)
    parts = []
    for side in (-1, 1):
        parts.append(Part(ellipse(side * 0.38, -0.85, ear, ear), toy.parts))
        parts.append(Part(ellipse(side * 0.58, 0.1, 0.17, 0.3), toy.parts))
        parts.append(Part(ellipse(side * 0.33, 0.8, 0.22, 0.2), toy.parts))
    parts.append(Part(ellipse(0, 0.3, belly, 0.58), toy.body, patterned=True))
    parts.append(Part(ellipse(0, -0.5, 0.48, 0.42), toy.body))
    parts.append(Part(ellipse(0, -0.38, 0.2, 0.15), toy.details))
    parts += [Part(ellipse(side * 0.19, -0.58, 0.07, 0.07), INK) for side in (-1, 1)]
    parts.append(Part(ellipse(0, -0.43, 0.07, 0.05), INK))
    if toy.proportions[2] < 0.4:
        parts.append(Part(polygon((-0.25, -0.1), (0.25, 0.08), (0.25, -0.1), (-0.25, 0.08)), toy.details))
    return Figure(parts, (0, 0.35, 0.24), (0, -0.9))


def _rocket(toy: Individual) -> Figure:
    width, fin = _between(toy, 0, 0.26, 0.4), _between(toy, 1, 0.2, 0.4)
    parts = [Part(polygon((-0.16, 0.7), (0, 1.05), (0.16, 0.7)), FLAME)]
    for side in (-1, 1):
        outline = polygon((side * width * 0.8, 0.2), (side * (width + fin), 0.8), (side * width * 0.7, 0.72))
        parts.append(Part(outline, toy.parts))
    parts.append(Part(rounded_box(-width, -0.5, width, 0.75), toy.body, patterned=True))
    parts.append(Part(polygon((-width, -0.42), (0, -1.05), (width, -0.42)), toy.parts))
    if toy.proportions[2] < 0.6:
        parts += [Part(ellipse(0, -0.2, 0.17, 0.17), EYE_WHITE), Part(ellipse(0, -0.2, 0.12, 0.12), toy.details)]
    return Figure(parts, (0, 0.3, 0.18), (0, -0.95))


def _duck(toy: Individual) -> Figure:
    body, head = _between(toy, 0, 0.36, 0.5), _between(toy, 1, 0.28, 0.38)
    parts = [
        Part(polygon((-0.5, 0.2), (-0.98, -0.15), (-0.7, 0.4)), toy.parts),
        Part(ellipse(-0.05, 0.3, 0.7, body), toy.body, patterned=True),
        Part(ellipse(0.42, -0.38, head, head), toy.body),
        Part(polygon((0.68, -0.45), (1.05, -0.3), (0.68, -0.2)), toy.details),
        Part(ellipse(-0.15, 0.25, 0.32, 0.2), toy.parts),
        Part(ellipse(0.5, -0.45, 0.08, 0.08), EYE_WHITE),
        Part(ellipse(0.51, -0.45, 0.05, 0.05), INK),
    ]
    if toy.proportions[2] < 0.5:
        parts.append(Part(rounded_box(0.18, -0.12, 0.62, 0.0), toy.details))
    return Figure(parts, (-0.1, 0.3, 0.18), (0.42, -0.68))


def _mushroom(toy: Individual) -> Figure:
    stem = _between(toy, 0, 0.16, 0.28)
    parts = [Part(rounded_box(-stem, -0.1, stem, 0.9), toy.parts)]
    if toy.proportions[1] < 0.5:
        parts.append(Part(rounded_box(-stem * 1.5, 0.1, stem * 1.5, 0.22), toy.details))
    cap, height = _between(toy, 2, 0.6, 0.85), _between(toy, 3, 0.6, 0.95)
    angle = np.linspace(math.pi, 2 * math.pi, 24)
    parts.append(Part(np.stack([cap * np.cos(angle), 0.1 + height * np.sin(angle)], axis=1), toy.body, patterned=True))
    return Figure(parts, (0, -0.25, 0.22), (0, 0.1 - height))


_DRAWINGS: dict[str, Callable[[Individual], Figure]] = {
    "robot": _robot,
    "car": _car,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "mug": _mug,
    "teddy": _teddy,
    "rocket": _rocket,
    "duck": _duck,
    "mushroom": _mushroom,
}
