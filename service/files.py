"""Files that are whole or not there: written beside their place, flushed, renamed into it."""

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PRIVATE = 0o600  # for its owner alone
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # what the disk raises when there is no room
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)  # another user's, read-only or broken
NOT_FLUSHED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # errors of file systems that cannot flush folders


@contextlib.contextmanager
def atomic_write(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
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
    flush_folder(path.parent)


def make_writable(folder: Path) -> None:
    """Make a folder if it is missing, and check that it can be written. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk. File systems that cannot do so (CIFS, some of FUSE) are accepted."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_FLUSHED:
            raise
    finally:
        os.close(handle)
