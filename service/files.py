"""Atomic writes: a file is complete or absent, also after a crash.

`distill.files` has its own writer, which also writes folders, and which the service does not import. Of the libraries
for this, atomicwrites is archived, and boltons does not flush the folder.
"""

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from service.errors import StartError

PRIVATE = 0o600  # readable by its owner only
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)  # another user's, read-only or broken
NOT_FLUSHED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # errors of file systems that cannot flush folders


@contextlib.contextmanager
def atomic_write(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block ends, and is deleted if the block raises.

    With concurrent writers, the last one wins. The umask applies to `mode`. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def make_writable(folder: Path) -> None:
    """Create a folder if it is missing, and check that it can be written. Raises OSError."""
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


def prepare_data_folder(folder: Path) -> None:
    """Create the server's data folder. Raises StartError if it cannot be created or written."""
    for needed in (folder, folder / "files"):
        try:
            make_writable(needed)
        except OSError as error:
            raise StartError(
                f"data: the folder {needed} cannot be created or written ({error.strerror}); make it writable for "
                "the user that the server runs as, or name another one with --data, or `none` to serve without "
                "files, batches and jobs"
            ) from None
