"""Rows of owners: their ids, one row, a page of them, and the limit of unfinished ones."""

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from sqlalchemy import Select, func, select, tuple_
from sqlalchemy.orm import Session

from service.errors import NotFound, Overloaded, quoted
from service.jobs.tables import ENDED, BatchRow, FileRow, JobRow, OwnedTable

R = TypeVar("R")
Owned = TypeVar("Owned", bound=OwnedTable)
Order = Literal["asc", "desc"]


def new_id(prefix: str) -> str:
    """Return an unguessable id. Ids sort by their time of creation."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(8)}"


def may_be_id(text: str) -> bool:
    """Whether a text of a client may be an id. PostgreSQL cannot compare one with the character U+0000."""
    return text.isascii() and text.isprintable()


def file_row(
    file_id: str, owner: str, purpose: str, filename: str, size: int, now: int, lifetime: int | None = None
) -> FileRow:
    """Return the row of a file that is kept for `lifetime` seconds, or until it is deleted."""
    expires = None if lifetime is None else now + lifetime
    return FileRow(
        id=file_id, owner=owner, purpose=purpose, filename=filename, bytes=size, created_at=now, expires_at=expires
    )


def owned(
    session: Session,
    kind: type[Owned],
    owner: str,
    row_id: str,
    param: str | None = None,
    *conditions: Any,
    lock: bool = False,
) -> Owned:
    """Return a row of this owner, with a lock on it if it will be changed. Raises NotFound."""
    rows = select(kind).where(kind.id == row_id, kind.owner == owner, *conditions)
    row = session.scalar(rows.with_for_update() if lock else rows) if may_be_id(row_id) else None
    if row is None:
        message = f"there is no {kind.noun} {quoted(row_id)}; GET {kind.path} lists yours"
        raise NotFound(message, param, f"{kind.noun}_not_found")
    return row


def index(
    session: Session,
    kind: type[Owned],
    owner: str,
    after: str | None,
    limit: int,
    *conditions: Any,
    order: Order = "desc",
) -> tuple[Sequence[Owned], bool]:
    """Return a page of an owner's rows by time of creation, and whether there are more."""
    start = None if after is None else owned(session, kind, owner, after, "after")
    rows = select(kind).where(kind.owner == owner, *conditions)
    return page(session, rows, (kind.created_at, kind.id), start, limit, order)


def page(
    session: Session, rows: Select[R], columns: Sequence[Any], after: R | None, limit: int, order: Order = "desc"
) -> tuple[Sequence[R], bool]:
    """Return the rows behind the row `after`, in the order of columns, and whether there are more."""
    if after is not None:
        key, start = tuple_(*columns), tuple_(*(getattr(after, column.key) for column in columns))
        rows = rows.where(key > start if order == "asc" else key < start)
    rows = rows.order_by(*(column if order == "asc" else column.desc() for column in columns))
    found = session.scalars(rows.limit(limit + 1)).all()
    return found[:limit], len(found) > limit


def check_unfinished(
    session: Session, kind: type[BatchRow | JobRow], owner: str, limit: int, retry_after: int, code: str
) -> None:
    """Raise Overloaded if the owner has too many unfinished batches or jobs."""
    unfinished = select(func.count()).where(kind.owner == owner, kind.status.not_in(ENDED))
    if (session.scalar(unfinished) or 0) >= limit:
        name = kind.path.rpartition("/")[2]
        raise Overloaded(f"{limit} of your {name} are unfinished; wait for one or cancel it", retry_after, code)
