"""Files that are whole or not there: written beside their place, flushed, renamed into it."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PRIVATE = 0o600  # for its owner alone
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # what the disk raises when there is no room


@contextlib.contextmanager
def aside(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """What to write the file `path` into: it takes that name when the block ends well, and vanishes otherwise.

    Several may write the same file side by side; the last one stays. `mode` is less the process's umask. Raises what
    the disk raises.
    """
    made = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
    _flush(path.parent)


def _flush(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
