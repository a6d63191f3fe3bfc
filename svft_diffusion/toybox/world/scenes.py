"""Backgrounds. Each scene is a function of (size, generator) that returns float RGB of shape (size, size, 3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from svft_diffusion.toybox.world.vocabulary import NAMED_COLOURS, Colour

Pixels = NDArray[np.float32]

# Scenes with ground, where an object casts a soft shadow.
GROUND_SCENES = frozenset({"grass", "beach", "snow", "desert", "wood"})


def background(scene: str, size: int, seed: int, plain_colour: str) -> Pixels:
    """The background of ``scene``, float RGB in [0, 255], shape (size, size, 3), the same for the same ``seed``."""
    if scene == "plain":
        _, y = _grid(size)
        return (_rgb(NAMED_COLOURS[plain_colour]) + (0.5 - y[..., None]) * 18).clip(0, 255)
    return _SCENES[scene](size, np.random.default_rng(seed)).clip(0, 255)


def _rgb(colour: Colour) -> Pixels:
    return np.array(colour, dtype=np.float32)


def _grid(size: int) -> tuple[Pixels, Pixels]:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    return x, y


def _noise(generator: np.random.Generator, size: int, cells: int) -> Pixels:
    coarse = generator.random((cells, cells)).astype(np.float32)
    smooth = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return (np.asarray(smooth, dtype=np.float32) - 0.5)[..., None]


def _specks(generator: np.random.Generator, size: int, share: float) -> NDArray[np.bool_]:
    half = generator.random((size // 2, size // 2)) > 1 - share
    return np.kron(half, np.ones((2, 2), dtype=bool))[..., None]


def _horizon(
    size: int, generator: np.random.Generator, sky: tuple[Colour, Colour], ground: tuple[Colour, Colour], texture: float
) -> tuple[Pixels, float]:
    """Sky over ground, each a vertical gradient, with the height of the horizon."""
    _, y = _grid(size)
    horizon = generator.uniform(0.42, 0.62)
    below = np.clip((y - horizon) * size / 1.5, 0, 1)[..., None]
    t = (y / horizon).clip(0, 1)[..., None]
    b = ((y - horizon) / (1 - horizon)).clip(0, 1)[..., None]
    upper = _rgb(sky[0]) * (1 - t) + _rgb(sky[1]) * t
    lower = _rgb(ground[0]) * (1 - b) + _rgb(ground[1]) * b + _noise(generator, size, 16) * texture
    return upper * (1 - below) + lower * below, horizon


def _grass(size: int, generator: np.random.Generator) -> Pixels:
    sky, ground = ((110, 175, 240), (190, 225, 250)), ((95, 175, 70), (60, 135, 45))
    return _horizon(size, generator, sky, ground, 60)[0]


def _beach(size: int, generator: np.random.Generator) -> Pixels:
    sky, ground = ((120, 195, 245), (175, 225, 250)), ((240, 220, 165), (225, 195, 130))
    image, horizon = _horizon(size, generator, sky, ground, 18)
    x, y = _grid(size)
    sea = ((y > horizon - 0.16) & (y < horizon))[..., None]
    return np.where(sea, _rgb((35, 125, 185)) + 25 * np.sin(y * 90 + x * 5)[..., None], image)


def _night(size: int, generator: np.random.Generator) -> Pixels:
    x, y = _grid(size)
    image = _rgb((12, 14, 45)) + y[..., None] * _rgb((25, 20, 55))
    image = np.where(_specks(generator, size, 0.035), _rgb((240, 240, 210)), image)
    moon = np.hypot(x - generator.uniform(0.12, 0.88), y - generator.uniform(0.1, 0.22))
    return np.where((moon < 0.09)[..., None], _rgb((250, 245, 205)), image)


def _snow(size: int, generator: np.random.Generator) -> Pixels:
    sky, ground = ((175, 190, 210), (205, 215, 228)), ((250, 252, 255), (232, 238, 248))
    image, _ = _horizon(size, generator, sky, ground, 10)
    return np.where(_specks(generator, size, 0.04), _rgb((255, 255, 255)), image)


def _checker(size: int, generator: np.random.Generator) -> Pixels:
    x, y = _grid(size)
    frequency = generator.uniform(3.5, 5)
    fields = np.floor(x * frequency + generator.random()) + np.floor(y * frequency + generator.random())
    light = (fields % 2)[..., None]
    return light * _rgb((225, 225, 220)) + (1 - light) * _rgb((70, 70, 78))


def _brick(size: int, generator: np.random.Generator) -> Pixels:
    x, y = _grid(size)
    row = np.floor(y * 8)
    mortar = ((x * 4 + 0.5 * (row % 2)) % 1 < 0.08) | ((y * 8) % 1 < 0.16)
    stone = _rgb((165, 80, 60)) + 30 * _noise(generator, size, 8)
    return np.where(mortar[..., None], _rgb((200, 190, 180)), stone)


def _water(size: int, generator: np.random.Generator) -> Pixels:
    x, y = _grid(size)
    image = _rgb((60, 165, 205)) * (1 - y[..., None]) + _rgb((10, 65, 125)) * y[..., None]
    image = image + 14 * np.sin(x * 14 + 3 * np.sin(y * 9 + generator.random() * 6))[..., None]
    for _ in range(7):
        distance = np.hypot(x - generator.random(), y - generator.random())
        bubble = np.abs(distance - generator.uniform(0.02, 0.045)) < 0.014
        image = np.where(bubble[..., None], _rgb((200, 235, 245)), image)
    return image


def _desert(size: int, generator: np.random.Generator) -> Pixels:
    sky, ground = ((245, 205, 130), (250, 225, 170)), ((225, 150, 75), (195, 115, 50))
    image, horizon = _horizon(size, generator, sky, ground, 15)
    x, y = _grid(size)
    dune = y > horizon + 0.1 + 0.07 * np.sin(x * 6 + generator.random() * 6)
    return np.where(dune[..., None], image * 0.9, image)


def _wood(size: int, generator: np.random.Generator) -> Pixels:
    sky, ground = ((215, 205, 190), (200, 188, 170)), ((165, 110, 60), (140, 88, 45))
    image, horizon = _horizon(size, generator, sky, ground, 8)
    _, y = _grid(size)
    gap = ((y * 14) % 1 < 0.13) & (y > horizon)
    return np.where(gap[..., None], _rgb((100, 62, 30)), image)


def _sunset(size: int, generator: np.random.Generator) -> Pixels:
    sky, ground = ((95, 50, 120), (250, 130, 60)), ((60, 40, 70), (30, 22, 45))
    image, horizon = _horizon(size, generator, sky, ground, 10)
    x, y = _grid(size)
    distance = np.hypot(x - generator.uniform(0.2, 0.8), y - horizon)
    return np.where(((distance < 0.13) & (y < horizon))[..., None], _rgb((255, 225, 110)), image)


_SCENES: dict[str, Callable[[int, np.random.Generator], Pixels]] = {
    "grass": _grass,
    "beach": _beach,
    "night": _night,
    "snow": _snow,
    "checker": _checker,
    "brick": _brick,
    "water": _water,
    "desert": _desert,
    "wood": _wood,
    "sunset": _sunset,
}
