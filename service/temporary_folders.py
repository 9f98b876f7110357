"""Temporary folders that end with this process, also by a signal or by `os._exit`, which skip Python's own cleanup."""

import atexit
import contextlib
import shutil
import tempfile
from collections.abc import Iterator

_made: set[str] = set()


def make_folder(prefix: str) -> str:
    """Make a folder, whose name begins with a prefix."""
    folder = tempfile.mkdtemp(prefix=prefix)
    _made.add(folder)
    return folder


def remove_folder(folder: str) -> None:
    """Remove a folder of `make_folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    _made.discard(folder)


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[str]:
    """Provide a folder for a block."""
    folder = make_folder(prefix)
    try:
        yield folder
    finally:
        remove_folder(folder)


def remove_folders() -> None:
    """Remove all folders of `make_folder`, before the process ends."""
    for folder in list(_made):
        remove_folder(folder)


atexit.register(remove_folders)
