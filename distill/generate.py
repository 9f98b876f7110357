"""Images for people: a student, prompts and seeds in, PNG files out that say what they were made of."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin

from distill.errors import DistillError
from distill.evaluate.picture import labelled_grid, save_png
from distill.files import aside
from distill.pipeline import OneStepPipeline

GRID = 64  # images in a grid at most; they are held in memory for it


def generate_images(
    pipeline: OneStepPipeline,
    prompts: Sequence[str],
    seed: int,
    batch: int,
    out: Path,
    grid: Path | None = None,
    steps: int = 1,
) -> Iterator[int]:
    """Write `<index>-<seed>.png` for each prompt, seeds counting up from `seed`, and yield how many are written.

    An image depends on its prompt and its seed alone: `batch` changes nothing in it, and its seed given with its
    prompt makes it again. Raises DistillError when the disk refuses; nothing half-written keeps a final name. More
    `steps` than one are for students of any step; others raise ConfigError.
    """
    shown = []
    for start in range(0, len(prompts), batch):
        texts = prompts[start : start + batch]
        seeds = range(seed + start, seed + start + len(texts))
        images = pipeline(texts, seeds, steps=steps)
        for i, (text, own, image) in enumerate(zip(texts, seeds, images, strict=True), start):
            save_image(Image.fromarray(image.numpy()), text, own, out / f"{i:05d}-{own}.png")
        if grid is not None:
            shown.append(images[: max(0, GRID - start)])
        yield start + len(texts)
    if grid is not None:
        tiles = torch.cat(shown).numpy()
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
