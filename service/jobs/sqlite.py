"""Connections to a SQLite file. With its write-ahead log, transactions that read never wait for one that writes."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import ArgumentError

from service.errors import StartError

BUSY_SECONDS = 30.0  # how long a writer waits for another one


def file_of(url: URL) -> Path:
    """Return the file of a URL. Raises ArgumentError for an in-memory database, which connections do not share."""
    if url.database in (None, "", ":memory:") or "uri" in url.query:
        raise ArgumentError(f"{url} names no file")
    return Path(str(url.database))


def writers(url: URL) -> Engine:
    """Return connections for writing. Transactions wait for each other at BEGIN, where a failure loses no work."""
    return _engine(url, _prepare, "BEGIN IMMEDIATE")


def readers(url: URL) -> Engine:
    """Return connections for reading, in a pool that waiting writers do not exhaust."""
    return _engine(url, _prepare_reader, "BEGIN")


@contextmanager
def prepared(file: Path) -> Iterator[None]:
    """Switch a file to the write-ahead log. Servers run this and the block inside it one after another.

    This needs a lock file, because SQLite fails instead of waiting if two connections switch a new file at once.
    """
    if not file.parent.is_dir():
        raise NotADirectoryError(f"there is no folder {file.parent}")
    with _lock(file):
        with closing(sqlite3.connect(file, timeout=BUSY_SECONDS)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # the setting is stored in the file
        yield


def check_sqlite(path: Path) -> None:
    """Raise StartError for a file that is damaged, not a database, or not writable. A missing file is accepted."""
    if not path.exists():
        return
    try:
        with _lock(path), closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA user_version = {version}")  # fails if the file cannot be written
            connection.execute("ROLLBACK")
            found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except (sqlite3.Error, OSError) as error:
        found = str(error)
    if found != "ok":
        reason = " ".join(found.split())
        raise StartError(
            f"the database {path} cannot be used ({reason}); make it and its folder writable for the user that the "
            "server runs as, or restore the data folder from a backup"
        )


def _lock(file: Path) -> FileLock:
    """Return the lock that serializes servers which start at the same time."""
    return FileLock(f"{file}.lock")


def _engine(url: URL, prepare: Any, begin: str) -> Engine:
    made = create_engine(url, hide_parameters=True, pool_pre_ping=True, connect_args={"timeout": BUSY_SECONDS})

    def begun(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    event.listen(made, "connect", prepare)
    event.listen(made, "begin", begun)
    return made


def _prepare(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # the engine begins transactions, not the driver
    connection.execute("PRAGMA synchronous = FULL")  # a commit waits until its data is on the disk
    connection.execute("PRAGMA foreign_keys = ON")


def _prepare_reader(connection: Any, record: Any) -> None:
    _prepare(connection, record)
    connection.execute("PRAGMA query_only = ON")
