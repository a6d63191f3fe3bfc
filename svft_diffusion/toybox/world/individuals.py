"""Drawing individuals and views at random, each from an explicit :class:`random.Random`."""

from __future__ import annotations

import colorsys
import math
import random
from dataclasses import dataclass

from svft_diffusion.toybox.world.vocabulary import (
    CLASSES,
    EMBLEMS,
    PALETTE,
    PATTERNS,
    SCENES,
    Colour,
)


@dataclass(frozen=True)
class Individual:
    """What stays fixed between the pictures of one toy.

    ``body_name`` is the palette name of the body colour, or ``None`` for a body outside the palette.
    ``proportions`` are six numbers in [0, 1] whose meaning each class decides (width, ears, roof, ...).
    """

    class_name: str
    body_name: str | None
    body: Colour
    parts: Colour
    details: Colour
    pattern: str
    pattern_colour: Colour
    pattern_frequency: float
    pattern_angle: float
    emblem: str
    emblem_colour: Colour
    proportions: tuple[float, ...]


@dataclass(frozen=True)
class View:
    """What changes between two pictures of one toy; lengths are fractions of the image's side, ``rotation`` radians."""

    scene: str
    x: float
    y: float
    size: float
    rotation: float
    flip: bool
    light: float
    hat: str | None
    background: str
    seed: int


def near_colour(colour: Colour, generator: random.Random) -> Colour:
    """``colour`` with a little change of hue, lightness and saturation, small enough to keep its name."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in colour))
    hue = (hue + generator.uniform(-0.02, 0.02)) % 1
    lightness = min(0.96, max(0.12, lightness + generator.uniform(-0.06, 0.06)))
    saturation = min(1.0, max(0.0, saturation * generator.uniform(0.8, 1.15)))
    return _to_bytes(colorsys.hls_to_rgb(hue, lightness, saturation))


def any_colour(generator: random.Random) -> Colour:
    """A colour of any hue."""
    return _to_bytes(colorsys.hsv_to_rgb(generator.random(), generator.uniform(0.35, 0.95), generator.uniform(0.35, 1)))


def random_individual(
    generator: random.Random, class_name: str | None = None, *, off_palette: float = 0.25
) -> Individual:
    """An individual of ``class_name`` (``None``: any), with that probability of a body outside the palette."""
    body_name = None if generator.random() < off_palette else generator.choice(list(PALETTE))
    body = any_colour(generator) if body_name is None else near_colour(PALETTE[body_name], generator)
    # A pattern covers less than half of the body, so that the body's colour stays the one a viewer would name.
    pattern_colour = near_colour(PALETTE[generator.choice([name for name in PALETTE if name != body_name])], generator)
    return Individual(
        class_name=class_name or generator.choice(CLASSES),
        body_name=body_name,
        body=body,
        parts=_part_colour(generator),
        details=_part_colour(generator),
        pattern=generator.choices(PATTERNS, (0.55, 0.15, 0.15, 0.15))[0],
        pattern_colour=pattern_colour,
        pattern_frequency=generator.uniform(3.2, 5.0),
        pattern_angle=generator.choice((0.0, math.pi / 2, math.pi / 4, -math.pi / 4)),
        emblem=generator.choices(EMBLEMS, (0.5, 0.1, 0.1, 0.1, 0.1, 0.1))[0],
        emblem_colour=any_colour(generator),
        proportions=tuple(generator.random() for _ in range(6)),
    )


def random_view(generator: random.Random, scene: str | None = None, *, hat: bool | None = None) -> View:
    """A view in ``scene`` (any scene if ``None``), with a hat in one picture of eight unless ``hat`` decides it."""
    scenes = list(SCENES)
    wears_hat = generator.random() < 0.12 if hat is None else hat
    return View(
        scene=scene or generator.choices(scenes, [1.5 if name == "plain" else 1 for name in scenes])[0],
        x=generator.uniform(0.36, 0.64),
        y=generator.uniform(0.46, 0.60),
        size=generator.uniform(0.32, 0.44),
        rotation=generator.uniform(-0.2, 0.2),
        flip=generator.random() < 0.5,
        light=generator.uniform(0.88, 1.08),
        hat=generator.choice(list(PALETTE)) if wears_hat else None,
        background=generator.choice([*PALETTE, "gray", "gray", "gray", "white", "white", "white"]),
        seed=generator.randrange(1 << 30),
    )


def _part_colour(generator: random.Random) -> Colour:
    """Half of all parts take a palette colour, half any hue: the image autoencoder must carry both."""
    if generator.random() < 0.5:
        return near_colour(PALETTE[generator.choice(list(PALETTE))], generator)
    return any_colour(generator)


def _to_bytes(colour: tuple[float, float, float]) -> Colour:
    red, green, blue = (int(255 * channel) for channel in colour)
    return red, green, blue
