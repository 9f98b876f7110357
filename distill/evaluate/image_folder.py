"""Folders of images, searched without numpy."""

from pathlib import Path

from distill.errors import ScorerError

KINDS = {".png", ".jpg", ".jpeg", ".webp"}


def find_images(folder: Path) -> list[Path]:
    """Find the image files in a folder and its subfolders, except grids. Raises ScorerError for fewer than two."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in KINDS and not path.name.startswith("."))
    found = sorted(path for path in files if path.stem != "grid")
    if len(found) < 2:
        raise ScorerError(f"{folder} holds {len(found)} images; give a folder of at least two PNG, JPEG or WebP files")
    return found
