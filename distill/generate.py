"""Images for people: a model, prompts and seeds in, PNG files out that say what they were made of."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from distill.errors import DistillError
from distill.evaluate.judge import Generate
from distill.evaluate.picture import labelled_grid, save_png
from distill.files import aside

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
    its prompt makes it again. Raises DistillError when the disk refuses; nothing half-written keeps a final name.
    """
    shown = []
    for start in range(0, len(prompts), batch):
        texts = prompts[start : start + batch]
        seeds = range(seed + start, seed + start + len(texts))
        images = generate(texts, seeds)
        for i, (text, own, image) in enumerate(zip(texts, seeds, images, strict=True), start):
            save_image(Image.fromarray(image), text, own, out / f"{i:05d}-{own}.png")
        if grid is not None:
            shown.append(images[: max(0, GRID - start)])
        yield start + len(texts)
    if grid is not None:
        tiles = np.concatenate(shown)
        try:
            save_png(labelled_grid([("", tiles)], prompts[:GRID]), grid)
        except OSError as error:
            raise DistillError(f"could not write {grid}: {error}; make room or give another --grid") from error


def save_image(image: Image.Image, prompt: str, seed: int, path: Path) -> None:
    """Write an image with its origin, whole or not at all."""
    words = PngImagePlugin.PngInfo()
    words.add_itxt("prompt", prompt)  # iTXt, for the older kind of text is Latin alone
    words.add_itxt("seed", str(seed))
    try:
        with aside(path) as made:
            image.save(made, format="PNG", pnginfo=words)
    except OSError as error:
        raise DistillError(f"could not write {path}: {error}; make room or give another --out") from error
