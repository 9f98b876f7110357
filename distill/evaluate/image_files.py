"""Image files in folders, as metrics are taken of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from distill.data.srgb import to_srgb
from distill.errors import ScorerError

KINDS = {".png", ".jpg", ".jpeg", ".webp"}


def find_images(folder: Path) -> list[Path]:
    """Image files in a folder and below it, but for grids. Raises ScorerError when there are not two."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in KINDS and not path.name.startswith("."))
    found = sorted(path for path in files if path.stem != "grid")
    if len(found) < 2:
        raise ScorerError(f"{folder} holds {len(found)} images; give a folder of at least two PNG, JPEG or WebP files")
    return found


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """An image in sRGB (H, W, 3), upright and on white. Raises ScorerError for one that cannot be decoded."""
    with _opened(path) as image:
        return np.array(to_srgb(image))


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of the upright image, by the file's header. Raises ScorerError for one that is none."""
    with _opened(path) as image:
        width, height = image.size
        is_on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        return (height, width) if is_on_its_side else (width, height)


def prompt_of(path: Path) -> str:
    """The prompt that `distill generate` and `distill geneval` wrote into an image; ScorerError when it has none."""
    with _opened(path) as image:
        prompt = image.info.get("prompt")
    if not isinstance(prompt, str):
        raise ScorerError(
            f"{path} does not hold its prompt; CLIP score takes images of `distill generate` or `distill geneval`"
        )
    return prompt


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ScorerError(f"{path} cannot be decoded ({error}); make or fetch it again, or leave it out") from error
