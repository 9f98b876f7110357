"""Images for people: a model, prompts and seeds in, PNG files out that say what they were made of."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from distill.errors import DistillError
from distill.evaluate.base import Generate
from distill.files import check_replaceable
from distill.report.picture import labeled_grid, save_png

GRID = 64  # images in a grid at most; they are held in memory for it


def generate_images(
    generate: Generate,
    prompts: Sequence[str],
    seed: int,
    batch: int,
    out: Path,
    grid: Path | None = None,
) -> Iterator[int]:
    """Write `<index>-<seed>.png` for each prompt, seeds counting up from `seed`, and yield how many are written.

    A student's image depends on its prompt and its seed alone: `batch` changes nothing in it, and its seed given with
    its prompt makes it again. Raises OutputError, before anything is made, when other files are in the places of
    images or grid, and DistillError when the disk refuses; nothing half-written keeps a final name.
    """
    paths = [out / f"{i:05d}-{seed + i}.png" for i in range(len(prompts))]
    for path in (*paths, *([grid] if grid is not None else ())):
        check_replaceable(path)
    shown = []
    for start in range(0, len(prompts), batch):
        texts = prompts[start : start + batch]
        seeds = range(seed + start, seed + start + len(texts))
        images = generate(texts, seeds)
        for i, (text, own, image) in enumerate(zip(texts, seeds, images, strict=True), start):
            save_image(Image.fromarray(image), text, own, paths[i])
        if grid is not None:
            shown.append(images[: max(0, GRID - start)])
        yield start + len(texts)
    if grid is not None:
        tiles = np.concatenate(shown)
        try:
            save_png(labeled_grid([("", tiles)], prompts[:GRID]), grid)
        except OSError as error:
            raise DistillError(f"could not write {grid}: {error}; make room or give another --grid") from error


def save_image(image: Image.Image, prompt: str, seed: int, path: Path) -> None:
    """Write an image with its origin, whole or not at all."""
    try:
        save_png(image, path, {"prompt": prompt, "seed": str(seed)})
    except OSError as error:
        raise DistillError(f"could not write {path}: {error}; make room or give another --out") from error
