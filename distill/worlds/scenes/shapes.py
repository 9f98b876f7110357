"""Shapes and colors of the toy dataset: eight shapes as signed distances, ten colors, one background.

A shape is defined in the square [-1, 1]^2, x right and y down. `coverage` holds each shape anti-aliased at
quarter-pixel sizes and offsets: the renderer copies from it, and the scorer matches against it.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

GROUND = (128, 128, 128)
# GenEval's ten colors, at least 90 of 255 apart in RGB.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 230, 30),
    "green": (20, 150, 50),
    "blue": (30, 70, 220),
    "purple": (130, 30, 170),
    "pink": (255, 140, 190),
    "brown": (120, 65, 20),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
}
COLORS = tuple(PALETTE)
RGB: Floats = np.array(list(PALETTE.values()), np.float32)  # (10, 3)
GROUND_RGB: Floats = np.array(GROUND, np.float32)  # (3,)

STEP = 0.25  # pixels: the grid of sizes and centers
RADII: Floats = np.arange(6, 13, STEP, dtype=np.float32)  # half the side of the frame, pixels
WINDOW = 28  # pixels: side of the patch that holds the largest shape at any offset


def _polygon(vertices: NDArray[np.float64]) -> Callable[[Floats, Floats], Floats]:
    """Build the signed distance to a closed polygon; negative inside (even-odd rule)."""

    def distance(x: Floats, y: Floats) -> Floats:
        nearest = np.full(x.shape, np.inf)
        inside = np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
            ex, ey = bx - ax, by - ay
            along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < ax + (y - ay) * ex / (ey if ey else 1.0))
        return np.asarray(np.sqrt(nearest) * np.where(inside, -1, 1), np.float32)

    return distance


def _star() -> NDArray[np.float64]:
    angle = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2, 0.46, 1.06)
    return np.stack([reach * np.sin(angle), 0.1 - reach * np.cos(angle)], axis=1)


def _heart() -> NDArray[np.float64]:
    s = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(s) - 5 * np.cos(2 * s) - 2 * np.cos(3 * s) - np.cos(4 * s)
    return np.stack([np.sin(s) ** 3, -(y + 2.5) / 15.2], axis=1)


def _cross() -> NDArray[np.float64]:
    a, b = 0.36, 1.0
    corners = [(a, b), (a, a), (b, a), (b, -a), (a, -a), (a, -b)]
    return np.array(corners + [(-x, -y) for x, y in corners])


_DISTANCE: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": lambda x, y: np.hypot(x, y) - np.float32(0.95),
    "square": _polygon(np.array([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)])),
    "triangle": _polygon(np.array([(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)])),
    "star": _polygon(_star()),
    "heart": _polygon(_heart()),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - np.float32(0.75)) - np.float32(0.22),
    "cross": _polygon(_cross()),
    "diamond": _polygon(np.array([(0.0, -1.0), (0.8, 0.0), (0.0, 1.0), (-0.8, 0.0)])),
}
SHAPES = tuple(_DISTANCE)


@lru_cache(maxsize=1)
def coverage() -> Floats:
    """Return the share of each pixel that each shape covers, (shape, radius, y offset, x offset, WINDOW, WINDOW).

    The center of the shape lies `offset * STEP` pixels right of and below the center of the window.
    """
    offsets = np.arange(round(1 / STEP), dtype=np.float32) * STEP
    pixels = np.arange(WINDOW, dtype=np.float32) + 0.5 - WINDOW / 2
    r = RADII[:, None, None, None, None]
    y = pixels[:, None] - offsets[:, None, None, None]
    x = pixels - offsets[:, None, None]
    shape = (len(RADII), len(offsets), len(offsets), WINDOW, WINDOW)
    x, y = np.broadcast_to(x / r, shape), np.broadcast_to(y / r, shape)
    return np.stack([np.clip(0.5 - d(x, y) * r, 0, 1) for d in _DISTANCE.values()]).astype(np.float32)


@lru_cache(maxsize=1)
def extents() -> Floats:
    """Return left, right, top and bottom of each shape in its own frame: (shape, 4)."""
    axis = np.linspace(-1.1, 1.1, 441, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    rows = []
    for distance in _DISTANCE.values():
        inside = distance(x, y) <= 0
        xs, ys = axis[inside.any(axis=0)], axis[inside.any(axis=1)]
        rows.append((xs[0], xs[-1], ys[0], ys[-1]))
    return np.array(rows, np.float32)
