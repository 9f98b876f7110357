"""`FileStore`: rows in the database, bytes in a folder under their ids. A row implies complete bytes."""

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, BinaryIO

from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from service.errors import BodyTooLarge, Forbidden, InvalidRequest
from service.files import atomic_write
from service.jobs import rows
from service.jobs.database import Database
from service.jobs.tables import ENDED, BatchRow, FileRow, JobRow

ORPHAN_SECONDS = 86_400  # after which bytes without a row are not an upload in progress, but the remains of one
_PIECE = 1 << 20
_OURS = re.compile(r"\.?file-[0-9a-f]{32}(\.[0-9a-f]{16}\.part)?")  # other files are never deleted


class FileStore:
    """The files of all owners; each owner sees only its own. Every method blocks: call them off the event loop."""

    def __init__(self, database: Database, folder: Path, max_bytes: int, quota_bytes: int) -> None:
        """Creates `folder`. `quota_bytes` limits the files of one owner, `max_bytes` one upload."""
        self._database = database
        self._folder = folder
        self._max_bytes = max_bytes
        self._quota_bytes = quota_bytes
        self._orphans_swept_at = 0
        folder.mkdir(exist_ok=True)

    def path(self, file_id: str) -> Path:
        """Return the path of the bytes of a file."""
        return self._folder / file_id

    def add(
        self, source: BinaryIO, *, owner: str, purpose: str, filename: str, now: int, lifetime: int | None
    ) -> FileRow:
        """Store an upload. Raises BodyTooLarge, Forbidden over the quota, InvalidRequest for an empty file."""
        size = source.seek(0, os.SEEK_END)
        source.seek(0)
        if size == 0:
            raise InvalidRequest("the file is empty", "file", "empty_file")
        if size > self._max_bytes:
            raise BodyTooLarge(f"the file is over the limit of {self._max_bytes} bytes", "file", "file_too_large")
        with self._database.read() as session:
            self._check_quota(session, owner, size)
        file = rows.file_row(rows.new_id("file-"), owner, purpose, _sanitized(filename), size, now, lifetime)
        try:
            with self.writing(file.id) as target:
                shutil.copyfileobj(source, target, _PIECE)
            with self._database.begin(owner) as session:
                self._check_quota(session, owner, size)  # again, because of concurrent uploads
                session.add(file)
        except (OSError, Forbidden):
            self.path(file.id).unlink(missing_ok=True)
            raise
        return file

    def writing(self, file_id: str) -> AbstractContextManager[IO[bytes]]:
        """Write the bytes of a file atomically, before its row is added."""
        return atomic_write(self.path(file_id))

    def get(self, owner: str, file_id: str, now: int, param: str | None = None) -> FileRow:
        """Return a file. Raises NotFound if it does not exist, has expired, or has another owner."""
        with self._database.read() as session:
            return self.own(session, owner, file_id, now, param)

    def index(
        self, owner: str, purpose: str | None, after: str | None, order: rows.Order, limit: int, now: int
    ) -> tuple[Sequence[FileRow], bool]:
        """Return a page of files by time of creation, and whether there are more."""
        conditions = [_unexpired(now)] if purpose is None else [_unexpired(now), FileRow.purpose == purpose]
        with self._database.read() as session:
            return rows.index(session, FileRow, owner, after, limit, *conditions, order=order)

    def remove(self, owner: str, file_id: str, now: int) -> None:
        """Delete a file. Raises NotFound, and InvalidRequest while an unfinished batch or job needs it."""
        with self._database.begin(owner) as session:  # so that no batch is created meanwhile
            file = self.own(session, owner, file_id, now)
            if session.scalar(select(func.count()).where(FileRow.id == file_id, _needed())):
                raise InvalidRequest("an unfinished batch or job needs this file; cancel it first", code="file_in_use")
            session.delete(file)
        self.path(file_id).unlink(missing_ok=True)

    def sweep(self, now: int) -> None:
        """Delete expired files, and the remains of interrupted uploads."""
        with self._database.begin() as session:
            expired = delete(FileRow).where(FileRow.expires_at <= now, ~_needed()).returning(FileRow.id)
            gone = list(session.scalars(expired))
        for file_id in gone:
            self.path(file_id).unlink(missing_ok=True)
        if now - self._orphans_swept_at >= ORPHAN_SECONDS:
            self._orphans_swept_at = now
            for path in self._folder.iterdir():
                if _OURS.fullmatch(path.name):
                    self._sweep_orphan(path, now)

    def _sweep_orphan(self, path: Path, now: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # swept by another server
            if path.stat().st_mtime < now - ORPHAN_SECONDS:
                with self._database.read() as session:
                    kept = session.get(FileRow, path.name) is not None
                if not kept:
                    path.unlink()

    def own(self, session: Session, owner: str, file_id: str, now: int, param: str | None = None) -> FileRow:
        """Like `get`, within a transaction that relies on the file."""
        return rows.owned(session, FileRow, owner, file_id, param, _unexpired(now))

    def _check_quota(self, session: Session, owner: str, size: int) -> None:
        kept = session.scalar(select(func.coalesce(func.sum(FileRow.bytes), 0)).where(FileRow.owner == owner)) or 0
        if kept + size > self._quota_bytes:
            raise Forbidden(
                f"your files would be {kept + size} bytes, over your quota of {self._quota_bytes}; delete some",
                "file",
                "quota_exceeded",
            )


def _unexpired(now: int) -> Any:
    return or_(FileRow.expires_at.is_(None), FileRow.expires_at > now)


def _needed() -> Any:
    """Whether an unfinished batch or job reads the file."""
    batch = select(BatchRow.id).where(BatchRow.input_file_id == FileRow.id, BatchRow.status.not_in(ENDED))
    job = select(JobRow.id).where(
        or_(JobRow.training_file == FileRow.id, JobRow.validation_file == FileRow.id), JobRow.status.not_in(ENDED)
    )
    return or_(batch.exists(), job.exists())


def _sanitized(filename: str) -> str:
    """Return the last part of a path, without unprintable characters."""
    name = "".join(letter for letter in filename.replace("\\", "/").rsplit("/", 1)[-1] if letter.isprintable())
    return name[-255:] or "file"
