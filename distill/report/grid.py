"""Grids of images with labels: rows of models, columns of prompts, captions wrapped below the tiles."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from distill.files import MARK, atomic_write, check_replaceable

TILE = 128  # pixels
GAP = 6
LINE = 13
PAPER, INK = (255, 255, 255), (40, 40, 40)


def labeled_grid(
    rows: Sequence[tuple[str, NDArray[np.uint8]]], captions: Sequence[str], columns: int = 8
) -> Image.Image:
    """Draw rows of a name and images (N, H, W, 3), with captions below the columns, in bands of at most `columns`."""
    font = ImageFont.load_default(11)
    left = 12 + max(int(font.getlength(name)) for name, _ in rows)
    wrapped = [textwrap.wrap(caption, TILE // 6) for caption in captions]
    bands = [range(i, min(i + columns, len(captions))) for i in range(0, len(captions), columns)]
    heights = [len(rows) * (TILE + GAP) + LINE * max(len(wrapped[i]) for i in band) + GAP for band in bands]
    width = left + min(columns, len(captions)) * (TILE + GAP) + GAP
    page = Image.new("RGB", (width, sum(heights) + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    top = GAP
    for band, height in zip(bands, heights, strict=True):
        for k, (name, images) in enumerate(rows):
            y = top + k * (TILE + GAP)
            draw.text((GAP, y + TILE // 2 - LINE // 2), name, INK, font)
            for column, i in enumerate(band):
                page.paste(Image.fromarray(tile(images[i])), (left + column * (TILE + GAP), y))
        for column, i in enumerate(band):
            for n, line in enumerate(wrapped[i]):
                y = top + len(rows) * (TILE + GAP) + n * LINE - 2
                draw.text((left + column * (TILE + GAP), y), line, INK, font)
        top += height
    return page


def tile(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Resize an image (H, W, 3) to a tile of a grid; if it is not square, with margins."""
    height, width = image.shape[:2]
    size = tuple(max(1, round(side * TILE / max(height, width))) for side in (width, height))
    page = Image.new("RGB", (TILE, TILE), PAPER)
    page.paste(
        Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), tuple((TILE - side) // 2 for side in size)
    )
    return np.asarray(page)


def save_png(image: Image.Image, path: Path, texts: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write a PNG file atomically, with text fields. Raises OutputError in place of another file, and OSError."""
    check_replaceable(path)
    fields = PngImagePlugin.PngInfo()
    for name, text in {"Software": MARK, **texts}.items():
        fields.add_itxt(name, text)  # iTXt holds Unicode; tEXt only Latin-1
    with atomic_write(path) as partial:
        image.save(partial, format="PNG", pnginfo=fields)
