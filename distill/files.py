"""Files and folders that are whole or not there: written beside their place, flushed, renamed into it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Where to write the file or folder `path`: it takes that name when the block ends well, and vanishes otherwise.

    A folder cannot be renamed over another, so an older one is put aside first; a kill between the two renames leaves
    it where `put_back` finds it. Raises what the disk raises.
    """
    made, old = _hidden(path, "partial"), _hidden(path, "old")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(made)
    try:
        yield made
        for each in (*made.rglob("*"), made):
            flush(each)
        if made.is_dir() and path.exists():
            _remove(old)
            path.rename(old)
        made.replace(path)
        flush(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        _remove(made)
        raise
    _remove(old)


def write_aside(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    with aside(path) as made:
        made.write_text(text, encoding="utf-8")


def put_back(folder: Path) -> None:
    """Give what a kill left between two renames, in a folder or one below it, its name again.

    For one process alone, since another may be between the two.
    """
    for old in (*folder.glob(".*.old"), *folder.glob("*/.*.old")):
        path = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if path.exists():
            _remove(old)
        else:
            old.rename(path)


def flush(path: Path) -> None:
    """Make a file or folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hidden(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
