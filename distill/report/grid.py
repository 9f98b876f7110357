"""Grids of images with labels: rows of models, columns of prompts, captions wrapped below the tiles."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from distill.files import MARK, atomic_write, check_replaceable

TILE, LARGEST = 128, 256  # side in pixels of the tiles of small images, and of those of large ones
GAP = 6
LINE = 13
PAPER, INK = (255, 255, 255), (40, 40, 40)


def labeled_grid(
    rows: Sequence[tuple[str, NDArray[np.uint8]]], captions: Sequence[str], columns: int = 8
) -> Image.Image:
    """Draw rows of a name and images (N, H, W, 3), with captions below the columns, in bands of at most `columns`.

    Images of up to LARGEST pixels are shown whole. Larger ones are reduced to it, and smaller ones than TILE enlarged.
    """
    side = min(LARGEST, max(TILE, *(max(images.shape[1:3]) for _, images in rows)))
    font = ImageFont.load_default(11)
    left = 12 + max(int(font.getlength(name)) for name, _ in rows)
    wrapped = [textwrap.wrap(caption, side // 6) for caption in captions]
    bands = [range(i, min(i + columns, len(captions))) for i in range(0, len(captions), columns)]
    heights = [len(rows) * (side + GAP) + LINE * max(len(wrapped[i]) for i in band) + GAP for band in bands]
    width = left + min(columns, len(captions)) * (side + GAP) + GAP
    page = Image.new("RGB", (width, sum(heights) + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    top = GAP
    for band, height in zip(bands, heights, strict=True):
        for k, (name, images) in enumerate(rows):
            y = top + k * (side + GAP)
            draw.text((GAP, y + side // 2 - LINE // 2), name, INK, font)
            for column, i in enumerate(band):
                page.paste(Image.fromarray(tile(images[i], side)), (left + column * (side + GAP), y))
        for column, i in enumerate(band):
            for n, line in enumerate(wrapped[i]):
                y = top + len(rows) * (side + GAP) + n * LINE - 2
                draw.text((left + column * (side + GAP), y), line, INK, font)
        top += height
    return page


def tile(image: NDArray[np.uint8], side: int = TILE) -> NDArray[np.uint8]:
    """Resize an image (H, W, 3) to a tile (side, side, 3) of a grid; if it is not square, with margins."""
    height, width = image.shape[:2]
    size = tuple(max(1, round(length * side / max(height, width))) for length in (width, height))
    page = Image.new("RGB", (side, side), PAPER)
    page.paste(
        Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), tuple((side - length) // 2 for length in size)
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
