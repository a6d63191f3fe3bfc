"""Drawing an individual in a view: Pillow polygons, four times supersampled, over a numpy background."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from svft_diffusion.toybox.world.geometry import Polygon, emblem_polygon, polygon, rounded_box
from svft_diffusion.toybox.world.individuals import Individual, View
from svft_diffusion.toybox.world.scenes import GROUND_SCENES, background
from svft_diffusion.toybox.world.shapes import figure
from svft_diffusion.toybox.world.vocabulary import PALETTE, Colour

SUPERSAMPLING = 4


class _Placement:
    """Object coordinates -> pixels of the supersampled layer, for one individual in one view."""

    def __init__(self, individual: Individual, view: View, side: int) -> None:
        # Trees are tall: a little smaller, so that their tips stay in the picture.
        self.scale = view.size * side * (0.92 if individual.class_name == "tree" else 1.0)
        self.x, self.y = view.x * side, view.y * side
        self.cosine, self.sine = math.cos(view.rotation), math.sin(view.rotation)
        self.mirror = -1 if view.flip else 1

    def pixels(self, outline: Polygon) -> list[tuple[float, float]]:
        x, y = outline[:, 0] * self.mirror, outline[:, 1]
        right = self.x + self.scale * (self.cosine * x - self.sine * y)
        down = self.y + self.scale * (self.sine * x + self.cosine * y)
        return list(zip(right.tolist(), down.tolist(), strict=True))

    def object_coordinates(self, side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The object coordinates of every second pixel, each of shape (side // 2, side // 2)."""
        y, x = np.mgrid[0 : side // 2, 0 : side // 2].astype(np.float32) * 2
        x, y = (x - self.x) / self.scale, (y - self.y) / self.scale
        return (self.cosine * x + self.sine * y) * self.mirror, -self.sine * x + self.cosine * y


def render(individual: Individual, view: View, size: int = 64) -> NDArray[np.uint8]:
    """The picture of an individual in a view, RGB of shape (size, size, 3)."""
    layer = _draw_object(individual, view, size * SUPERSAMPLING)
    drawn = np.asarray(layer.reduce(SUPERSAMPLING), dtype=np.float32)
    alpha = drawn[..., 3:] / 255
    y, x = np.mgrid[0:size, 0:size] / size
    shading = view.light * (1 - 0.28 * (y - view.y))[..., None]
    behind = background(view.scene, size, view.seed, view.background)
    if view.scene in GROUND_SCENES:
        across, along = (x - view.x) / (view.size * 0.9), (y - view.y - view.size) / (view.size * 0.22)
        behind = behind * (1 - 0.3 * np.clip(1.3 - across**2 - along**2, 0, 1)[..., None])
    mixed = drawn[..., :3] * shading * alpha + behind * (1 - alpha)
    return mixed.clip(0, 255).astype(np.uint8)


def _draw_object(individual: Individual, view: View, side: int) -> Image.Image:
    layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    place = _Placement(individual, view, side)
    drawing = figure(individual)
    line_width = max(1, side // 110)
    for part in drawing.parts:
        points = place.pixels(part.outline)
        if part.colour is None:
            draw.polygon(points, fill=(0, 0, 0, 0))
            continue
        if part.patterned and individual.pattern != "plain":
            mask = Image.new("L", (side, side), 0)
            ImageDraw.Draw(mask).polygon(points, fill=255)
            layer.paste(_pattern(individual, place, side), (0, 0), mask)
        else:
            draw.polygon(points, fill=(*part.colour, 255))
        draw.line([*points, points[0]], fill=_outline_colour(part.colour), width=line_width)
    if individual.emblem != "none":
        outline = emblem_polygon(individual.emblem, *drawing.emblem_place)
        draw.polygon(place.pixels(outline), fill=(*individual.emblem_colour, 255))
    if view.hat:
        _draw_hat(draw, place, drawing.hat_place, PALETTE[view.hat], line_width)
    return layer


def _pattern(individual: Individual, place: _Placement, side: int) -> Image.Image:
    """The body's texture; a pattern covers about a third of it, so the body keeps its colour's name."""
    u, v = place.object_coordinates(side)
    frequency = individual.pattern_frequency
    if individual.pattern == "striped":
        along = u * math.cos(individual.pattern_angle) + v * math.sin(individual.pattern_angle)
        marked = np.sin(along * frequency * math.pi) > 0.4
    elif individual.pattern == "dotted":
        marked = np.hypot((u * frequency * 0.9) % 1 - 0.5, (v * frequency * 0.9) % 1 - 0.5) < 0.33
    else:
        inset = (np.abs((u * frequency) % 1 - 0.5) < 0.42) & (np.abs((v * frequency) % 1 - 0.5) < 0.42)
        marked = ((np.floor(u * frequency) + np.floor(v * frequency)) % 2 > 0) & inset
    texture = np.where(
        marked[..., None],
        np.array(individual.pattern_colour, dtype=np.uint8),
        np.array(individual.body, dtype=np.uint8),
    )
    return Image.fromarray(texture).resize((side, side), Image.Resampling.NEAREST).convert("RGBA")


def _draw_hat(
    draw: ImageDraw.ImageDraw, place: _Placement, anchor: tuple[float, float], colour: Colour, line_width: int
) -> None:
    x, y = anchor
    crown = polygon((x - 0.2, y + 0.04), (x - 0.17, y - 0.34), (x + 0.17, y - 0.34), (x + 0.2, y + 0.04))
    draw.polygon(place.pixels(crown), fill=(*colour, 255))
    draw.polygon(place.pixels(rounded_box(x - 0.36, y - 0.02, x + 0.36, y + 0.1)), fill=(*colour, 255))
    brim = polygon((x - 0.36, y + 0.1), (x + 0.36, y + 0.1))
    draw.line(place.pixels(brim), fill=_outline_colour(colour), width=line_width)


def _outline_colour(colour: Colour) -> tuple[int, int, int, int]:
    red, green, blue = (int(channel * 0.45) for channel in colour)
    return red, green, blue, 255
