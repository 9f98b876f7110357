"""Image files in folders, read for metrics."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from distill.data.srgb import to_srgb
from distill.errors import ScorerError


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """Read an image in sRGB (H, W, 3), upright and on white. Raises ScorerError if it cannot be decoded."""
    with _opened(path) as image:
        return np.array(to_srgb(image))


def size_of(path: Path) -> tuple[int, int]:
    """Read width and height of the upright image from the header. Raises ScorerError if it cannot be decoded."""
    with _opened(path) as image:
        width, height = image.size
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        return (height, width) if rotated else (width, height)


def prompt_of(path: Path) -> str:
    """Read the prompt that `distill generate` or `distill geneval` wrote into an image, or raise ScorerError."""
    with _opened(path) as image:
        prompt = image.info.get("prompt")
    if not isinstance(prompt, str):
        raise ScorerError(
            f"{path} does not contain its prompt; CLIP score needs images of `distill generate` or `distill geneval`"
        )
    return prompt


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ScorerError(f"{path} cannot be decoded ({error}); replace or remove it") from error
