"""Scorer: detects the objects in images and returns GenEval's verdicts. It is exact on rendered scenes.

An object is a connected region that differs from the background. Its color is the palette color nearest to its core.
Its shape is the one whose anti-aliased template, fitted to the region's bounds, overlaps it best.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from distill.worlds.scenes.captions import TASKS, Prompt, Thing
from distill.worlds.scenes.render import SIZE, Object, Scene
from distill.worlds.scenes.shapes import COLORS, GROUND_RGB, RADII, RGB, SHAPES, STEP, WINDOW, coverage, extents

CONTRAST = 40.0  # RGB distance from the background above which a pixel belongs to an object
SMALLEST_AREA = 40  # pixels; smaller regions are ignored
COLOR_TOLERANCE = 70.0  # RGB distance from the palette above which a region is no object
OVERLAP = 0.75  # soft intersection over union below which a region is no object
POSITION_THRESHOLD = 0.1  # GenEval's: share of the objects' sizes that an offset must exceed


def detect(images: NDArray[np.uint8]) -> list[Scene]:
    """Detect the objects in images (N, 64, 64, 3). A region without a clear shape and color is no object."""
    if images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3) or images.dtype != np.uint8:
        raise ValueError(f"scenes are scored as uint8 (N, {SIZE}, {SIZE}, 3), not {images.dtype} {images.shape}")
    return [_detect_one(image.astype(np.float32)) for image in images]


def _detect_one(image: NDArray[np.float32]) -> Scene:
    offset = image - GROUND_RGB
    labels, _ = ndimage.label(np.linalg.norm(offset, axis=-1) > CONTRAST, structure=np.ones((3, 3)))
    objects = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        region = labels[box] == label
        if region.sum() < SMALLEST_AREA:
            continue
        found = _identify(offset[box] * region[..., None], box[1].start, box[0].start)
        if found is not None:
            objects.append(found)
    return tuple(objects)


def _identify(offset: NDArray[np.float32], left: int, top: int) -> Object | None:
    """Identify the object whose RGB offset from the background is `offset` (h, w, 3); None if there is none."""
    contrast = np.linalg.norm(offset, axis=-1)
    core = offset[contrast >= np.quantile(contrast[contrast > 0], 0.5)]
    distances = np.linalg.norm(RGB - GROUND_RGB - np.median(core, axis=0), axis=-1)
    color = int(distances.argmin())
    if distances[color] > COLOR_TOLERANCE:
        return None
    hue = RGB[color] - GROUND_RGB
    alpha = np.clip(offset @ hue / (hue @ hue), 0, 1)  # (h, w): share of each pixel that the object covers
    if max(alpha.shape) > WINDOW:
        return None

    # Sub-pixel bounds, from the outermost rows and columns that the object covers.
    x0, x1 = _bounds(alpha.max(axis=0))
    y0, y1 = _bounds(alpha.max(axis=1))
    if x1 <= x0 or y1 <= y0:
        return None
    e = extents()  # (shape, 4)
    radius = np.maximum((x1 - x0) / (e[:, 1] - e[:, 0]), (y1 - y0) / (e[:, 3] - e[:, 2]))
    x = (x0 + x1) / 2 - radius * (e[:, 0] + e[:, 1]) / 2  # centers, from the upper left of the box
    y = (y0 + y1) / 2 - radius * (e[:, 2] + e[:, 3]) / 2

    overlaps = np.array([_overlap(alpha, s, x[s], y[s], radius[s]) for s in range(len(SHAPES))])
    best = int(overlaps.argmax())
    if overlaps[best] < OVERLAP:
        return None
    return Object(SHAPES[best], COLORS[color], float(left + x[best]), float(top + y[best]), float(radius[best]))


def _bounds(profile: NDArray[np.float32]) -> tuple[float, float]:
    covered = np.flatnonzero(profile > 0.25)
    if len(covered) == 0:
        return 0.0, 0.0
    first, last = int(covered[0]), int(covered[-1])
    return first + 1 - min(1.0, float(profile[first])), last + min(1.0, float(profile[last]))


def _overlap(alpha: NDArray[np.float32], shape: int, x: float, y: float, radius: float) -> float:
    """Return the best soft intersection over union of `alpha` with templates near the fitted center and radius."""
    if not RADII[0] - 1 <= radius <= RADII[-1] + 1:
        return 0.0
    height, width = alpha.shape
    best = 0.0
    nearest = round((radius - float(RADII[0])) / STEP)
    for r in {int(np.clip(nearest + d, 0, len(RADII) - 1)) for d in (-2, 0, 2)}:
        for dy, dx in product((-1, 1), repeat=2):
            qx, qy = round(x / STEP) + dx, round(y / STEP) + dy
            canvas = np.zeros((WINDOW, WINDOW), np.float32)
            # Position of the region's upper left corner in the template's window.
            cx, cy = WINDOW // 2 - qx // 4, WINDOW // 2 - qy // 4
            if cx < 0 or cy < 0 or cx + width > WINDOW or cy + height > WINDOW:
                continue
            canvas[cy : cy + height, cx : cx + width] = alpha
            template = coverage()[shape, r, qy % 4, qx % 4]
            best = max(best, float(np.minimum(canvas, template).sum() / np.maximum(canvas, template).sum()))
    return best


def verdict(prompt: Prompt, scene: Scene) -> bool:
    """Return GenEval's verdict: objects, counts (exact), colors and relation match the prompt."""
    matches = [[o for o in scene if _matches(o, thing)] for thing in prompt.things]
    if prompt.task == "counting":
        return len(matches[0]) == prompt.count
    if not all(matches):
        return False
    if prompt.relation is None:
        return True
    return any(prompt.relation in _relations(a, b) for a in matches[0] for b in matches[1])


def _matches(found: Object, thing: Thing) -> bool:
    return found.shape == thing.shape and thing.color in (None, found.color)


def _relations(a: Object, b: Object) -> set[str]:
    """Return the relations of `a` to `b` by GenEval's rule: the offset of the centers, shortened by the sizes."""
    offset = np.array([a.x - b.x, a.y - b.y])
    slack = POSITION_THRESHOLD * 2 * (a.radius + b.radius)
    shortened = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    if not shortened.any():
        return set()
    dx, dy = shortened / np.linalg.norm(offset)
    names = {"left": dx < -0.5, "right": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in names.items() if holds}


def verdicts(prompts: Sequence[Prompt], images: NDArray[np.uint8]) -> dict[str, NDArray[np.float64]]:
    """Return the verdicts for each task that occurs, 1 for a correct image, in the order of the prompts."""
    found = [verdict(prompt, scene) for prompt, scene in zip(prompts, detect(images), strict=True)]
    by_task = {task: [right for right, p in zip(found, prompts, strict=True) if p.task == task] for task in TASKS}
    return {task: np.array(right, float) for task, right in by_task.items() if right}


def score(prompts: Sequence[Prompt], images: NDArray[np.uint8]) -> dict[str, float]:
    """Return the share of correct images for each task that occurs, and `overall`, the mean over tasks."""
    by_task = {task: float(right.mean()) for task, right in verdicts(prompts, images).items()}
    return {"overall": float(np.mean(list(by_task.values()))), **by_task}
