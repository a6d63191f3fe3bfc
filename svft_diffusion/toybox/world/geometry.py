"""Polygons in object coordinates: x to the right, y down, the object about [-1, 1] in both."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Polygon = NDArray[np.float64]


def ellipse(x: float, y: float, rx: float, ry: float, *, points: int = 28, exponent: float = 2.0) -> Polygon:
    """A superellipse around (x, y): an ellipse at ``exponent`` 2, nearly a box at 6."""
    angle = np.linspace(0, 2 * math.pi, points, endpoint=False)
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.stack(
        [
            x + rx * np.sign(cosine) * np.abs(cosine) ** (2 / exponent),
            y + ry * np.sign(sine) * np.abs(sine) ** (2 / exponent),
        ],
        axis=1,
    )


def rounded_box(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    """A box with soft corners."""
    return ellipse((x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2, points=32, exponent=6)


def box(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    """A box with sharp corners."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=float)


def polygon(*points: tuple[float, float]) -> Polygon:
    """A polygon from its corners."""
    return np.array(points, dtype=float)


def emblem_polygon(kind: str, x: float, y: float, size: float) -> Polygon:
    """The outline of a star, heart, disc, cross or bolt of half-size ``size`` around (x, y)."""
    if kind == "star":
        angle = np.arange(10) * math.pi / 5 - math.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, size, size * 0.45)
        return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)
    if kind == "heart":
        t = np.linspace(0, 2 * math.pi, 28)
        across = 16 * np.sin(t) ** 3
        up = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x + size * across / 16, y - size * up / 16], axis=1)
    if kind == "disc":
        return ellipse(x, y, size * 0.85, size * 0.85)
    if kind == "cross":
        k, q = size, size * 0.35
        corners = [(-q, -k), (q, -k), (q, -q), (k, -q), (k, q), (q, q)]
        corners += [(q, k), (-q, k), (-q, q), (-k, q), (-k, -q), (-q, -q)]
        return np.array(corners) + np.array([x, y])
    bolt = [(-0.1, -1), (0.6, -1), (0.15, -0.2), (0.6, -0.2), (-0.35, 1), (-0.05, 0.1), (-0.5, 0.1)]
    return np.array(bolt) * size + np.array([x, y])
