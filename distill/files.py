"""Atomic writes of files and folders: to a temporary path beside the final one, flushed, and renamed."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill.errors import OutputError

MARK = "Flow Generator Matching"  # the name of this program in the metadata of files that it writes
# How pictures, pages and single files hold it; a text that only names the program is not ours.
_OURS = re.compile(
    rf'\x89PNG\r\n.*?Software\0{{5}}{MARK}|<!doctype html>.*?<meta name="generator" content="{MARK}">'
    rf'|.{{8}}{{"__metadata__": {{"format": "pt", "software": "{MARK}"'.encode(),
    re.DOTALL,
)
_MARKED_BYTES = 1 << 20  # how much of a file is searched
_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.distill-partial")
NOT_FLUSHED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # errors of file systems that cannot flush folders


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which is flushed and renamed to `path` if the block succeeds and removed if it fails.

    The path is written as a file or a folder. A link is followed. An older file or folder is replaced: code that takes
    `path` from a user checks first that it may be. A folder cannot be renamed over another, so an older one is renamed
    first; if the process is killed between the two renames, `recover` restores it. Processes that write the same path
    at once have temporary paths of their own: one of them wins as a whole. Raises OSError with a path, and
    FileExistsError if a file is in the folder's place.
    """
    path = path.resolve()
    made, old = _hidden(path, f"{os.getpid()}.distill-partial"), _hidden(path, "distill-old")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_partial(path)
    try:
        yield made
        for each in (*made.rglob("*"), made):
            if each != made and each.is_file() and not each.is_symlink():
                make_readable(each)
            flush(each)
        if made.is_dir() and path.exists():
            if not path.is_dir():
                raise FileExistsError(errno.EEXIST, "a file is in the place of the folder", str(path))
            _remove(old)
            path.rename(old)
        made.replace(path)
        flush(path.parent)
    except BaseException as error:
        if old.exists() and not path.exists():
            old.rename(path)
        _remove(made)
        _name(error, path)
        raise
    _remove(old)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_write(path) as made:
        made.write_text(text, encoding="utf-8")


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append a line of JSON to a log. A killed process may leave a part of it. Raises OSError that names the file."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        _name(error, path)
        raise


def reason(error: Exception) -> object:
    """Why a file could not be written, for a sentence that names it: a system error without its path and number."""
    return getattr(error, "strerror", None) or error


def check_replaceable(path: Path, ours: re.Pattern[bytes] = _OURS) -> None:
    """Raise OutputError unless `path` is writable, and is absent or begins as this program's files do."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: {parent} is not a writable folder; name another file")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file")
    if path.exists():
        with path.open("rb") as file:
            if not ours.match(file.read(_MARKED_BYTES)):
                raise OutputError(f"{path} exists and was not written by this program; name another file, or move it")


def recover(folder: Path) -> None:
    """Clean up after killed processes, in a folder that only this process writes to and directly below it.

    What was left between two renames gets its name again, and what was not written completely is removed. Links to
    folders that others may write to are left alone.
    """
    for parent in (folder, *(each for each in folder.iterdir() if each.is_dir() and not each.is_symlink())):
        for left in parent.glob(".*.distill-partial"):
            if _is_abandoned(left):
                _remove(left)
        for old in parent.glob(_hidden(Path("*"), "distill-old").name):
            path = old.with_name(old.name.removeprefix(".").removesuffix(".distill-old"))
            if path.exists():
                _remove(old)
            else:
                old.rename(path)


def sha256(path: Path) -> str:
    """The checksum of a file, which is read in pieces. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Flush a file or folder to disk. File systems that cannot flush folders (CIFS, some of FUSE) are accepted."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_FLUSHED or not path.is_dir():
            raise
    finally:
        os.close(handle)


def make_readable(path: Path) -> None:
    """Let those read a file who can read its folder. The writer of safetensors makes files for their owner alone."""
    with suppress(OSError):  # file systems without permissions
        path.chmod(path.stat().st_mode | path.parent.stat().st_mode & 0o444)


def _hidden(path: Path, what: str) -> Path:
    """A name beside `path` that only this program uses, so that a file with it may be removed."""
    return path.with_name(f".{path.name}.{what}")


def _remove_partial(path: Path) -> None:
    """Remove temporary paths of `path` that this process or a killed one left."""
    for other in (*_left(path.parent), _hidden(path, f"{os.getpid()}.distill-partial")):
        if _is_abandoned(other, path.name):
            _remove(other)


def _is_abandoned(path: Path, name: str | None = None) -> bool:
    """Whether this is the temporary path of a file of this name, or of any, that no other live process writes."""
    found = _PARTIAL.fullmatch(path.name)
    if found is None or name not in (None, found["name"]):
        return False
    process = int(found["process"])
    return process == os.getpid() or not _lives(process)


@lru_cache(64)
def _left(folder: Path) -> tuple[Path, ...]:
    """The temporary paths in a folder, listed once, because it may hold a hundred thousand images."""
    return tuple(folder.glob(".*.distill-partial"))


def _lives(process: int) -> bool:
    """Whether a process with this id runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, PermissionError):  # of another user
        return True
    return True


def _name(error: BaseException, path: Path) -> None:
    """Add the path to a system error. Errors of opening have one; those of writing and flushing do not."""
    if isinstance(error, OSError) and error.strerror is not None and error.filename is None:
        error.filename = str(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
