"""Folders of images, searched without numpy."""

from pathlib import Path

from distill.data.images import is_hidden
from distill.errors import ScorerError

KINDS = {".png", ".jpg", ".jpeg", ".webp"}


def find_images(folder: Path) -> list[Path]:
    """Find the image files in a folder and its subfolders, except grids and what is hidden.

    Raises ScorerError for fewer than two.
    """
    files = (path for path in folder.rglob("*") if path.suffix.lower() in KINDS and path.stem != "grid")
    found = sorted(path for path in files if not is_hidden(path.relative_to(folder)))
    if len(found) < 2:
        raise ScorerError(f"{folder} holds {len(found)} images; give a folder of at least two PNG, JPEG or WebP files")
    return found
