"""Renderer: prompts to scenes to 64x64 RGB images, anti-aliased plain background, thousands per second on a core."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.worlds.scenes.captions import Prompt
from distill.worlds.scenes.shapes import COLORS, GROUND_RGB, RADII, RGB, SHAPES, STEP, WINDOW, coverage

SIZE = 64  # pixels
MARGIN = 2  # free pixels around each object, so that objects never touch
SMALLEST, LARGEST = 8.0, 11.0  # radii, pixels


@dataclass(frozen=True)
class Object:
    """An object in an image: center and radius in pixels; x points right and y down from the upper left corner."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


Scene = tuple[Object, ...]


def place(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """Draw a scene that matches the prompt: each object in a cell of its own, the whole image, a half or a quarter."""
    if prompt.count > 1:
        things = [prompt.things[0]] * prompt.count
    else:
        things = list(prompt.things)
    n = len(things)
    # Copies of one object share a color; two different objects have different colors.
    colors = rng.permutation(len(COLORS))
    radii = np.round(rng.uniform(SMALLEST, LARGEST, n) / STEP) * STEP

    if n == 1:
        corners, sizes = [(0.0, 0.0)], [(SIZE, SIZE)]
    elif n == 2:
        corners, sizes = _halves(prompt.relation, rng)
    else:
        quarters = rng.permutation(4)[:n]
        corners = [(SIZE / 2 * (q % 2), SIZE / 2 * (q // 2)) for q in quarters]
        sizes = [(SIZE // 2, SIZE // 2)] * n

    objects = []
    for i, (thing, (left, top), (width, height)) in enumerate(zip(things, corners, sizes, strict=True)):
        reach = radii[i] + MARGIN
        x = left + _on_grid(rng.uniform(reach, width - reach))
        y = top + _on_grid(rng.uniform(reach, height - reach))
        color = COLORS[colors[0 if prompt.count > 1 else i]]
        objects.append(Object(thing.shape, thing.color or color, x, y, float(radii[i])))
    return tuple(objects)


def _halves(relation: str | None, rng: np.random.Generator) -> tuple[list[tuple[float, float]], list[tuple[int, int]]]:
    """Return upper left corners and sizes of two adjacent cells, the first one `relation` of the second.

    With a relation, both cells are cut to one band, so that the offset is clearly along the axis of the relation.
    """
    drawn = relation or ("left", "right", "above", "below")[rng.integers(4)]
    band = 36 if relation else SIZE
    start = _on_grid(rng.uniform(0, SIZE - band))
    cells: list[tuple[float, float]] = [(0.0, start), (SIZE / 2, start)]
    size = (SIZE // 2, band)
    if drawn in ("above", "below"):
        cells, size = [(y, x) for x, y in cells], (band, SIZE // 2)
    if drawn in ("right", "below"):
        cells.reverse()
    return cells, [size, size]


def _on_grid(value: float) -> float:
    return float(np.floor(value / STEP) * STEP)


def render(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """Render pixels (N, SIZE, SIZE, 3). The n-th objects of all scenes are drawn in one pass."""
    pad = WINDOW // 2
    side = SIZE + 2 * pad
    canvas = np.zeros((len(scenes), side, side, 3), np.float32)
    window = np.arange(WINDOW)
    bank = coverage()
    per_pixel = round(1 / STEP)
    for slot in range(max(map(len, scenes), default=0)):
        rows = np.array([n for n, scene in enumerate(scenes) if len(scene) > slot])
        found = [scenes[n][slot] for n in rows]
        shape = np.array([SHAPES.index(o.shape) for o in found])
        radius = np.array([round((o.radius - float(RADII[0])) / STEP) for o in found])
        x = np.array([round(o.x / STEP) for o in found])
        y = np.array([round(o.y / STEP) for o in found])
        alpha = bank[shape, radius, y % per_pixel, x % per_pixel]  # (n, WINDOW, WINDOW)
        tint = RGB[[COLORS.index(o.color) for o in found]] - GROUND_RGB  # (n, 3)
        ys = (y // per_pixel)[:, None, None] + window[:, None]
        xs = (x // per_pixel)[:, None, None] + window
        canvas[rows[:, None, None], ys, xs] += alpha[..., None] * tint[:, None, None]
    inner = canvas[:, pad : pad + SIZE, pad : pad + SIZE] + GROUND_RGB
    return np.asarray(np.clip(np.rint(inner), 0, 255), np.uint8)
