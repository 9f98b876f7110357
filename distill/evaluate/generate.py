"""Images as PNG files that hold their prompt and seed: what `distill generate` writes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from distill.errors import DistillError
from distill.evaluate.base import Generate
from distill.files import check_replaceable, reason
from distill.report.grid import labeled_grid, save_png

GRID = 64  # maximum number of images in a grid; they are held in memory


def generate_images(
    generate: Generate, prompts: Sequence[str], seed: int, batch: int, out: Path, grid: Path | None = None
) -> Iterator[int]:
    """Write `<index>-<seed>.png` for each prompt, with seeds counting up from `seed`; yield the number written.

    A student's image depends only on its prompt and its seed, not on `batch`. Files are written atomically. Raises
    OutputError, before anything is generated, if other files are at the paths of the images or the grid, and
    DistillError if writing fails.
    """
    paths = [out / f"{i:05d}-{seed + i}.png" for i in range(len(prompts))]
    for path in (*paths, *([grid] if grid is not None else ())):
        check_replaceable(path)
    shown = []
    for start in range(0, len(prompts), batch):
        texts = prompts[start : start + batch]
        seeds = range(seed + start, seed + start + len(texts))
        images = generate(texts, seeds)
        for i, (text, image_seed, image) in enumerate(zip(texts, seeds, images, strict=True), start):
            save_image(Image.fromarray(image), text, image_seed, paths[i])
        if grid is not None:
            shown.append(images[: max(0, GRID - start)])
        yield start + len(texts)
    if grid is not None:
        tiles = np.concatenate(shown)
        try:
            save_png(labeled_grid([("", tiles)], prompts[:GRID]), grid)
        except OSError as error:
            raise DistillError(f"could not write {grid}: {reason(error)}; make room or give another --grid") from error


def save_image(image: Image.Image, prompt: str, seed: int, path: Path) -> None:
    """Write an image with its prompt and seed, atomically. Raises DistillError if writing fails."""
    try:
        save_png(image, path, {"prompt": prompt, "seed": str(seed)})
    except OSError as error:
        raise DistillError(f"could not write {path}: {reason(error)}; make room or give another --out") from error
