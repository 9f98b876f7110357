"""The lock of a folder that one process writes to: of a run, a cache or a training."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from distill.errors import ClaimedError, OutputError
from distill.files import recover

LOCK = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock a folder for this process, and clean up what killed processes left in it. The lock ends with the process.

    Raises ClaimedError if another process holds the lock, and OutputError if the folder cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ClaimedError(f"another run is writing to {folder}; wait for it, or give another --out") from error
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}; name another folder") from error
    try:
        recover(folder)
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a live process holds the folder's lock. A folder of another user counts as unlocked."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False
