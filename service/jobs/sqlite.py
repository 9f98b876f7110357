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

BUSY_SECONDS = 30.0  # that a writer waits for another one


def file_of(url: URL) -> Path:
    """The file that a URL names. Raises ArgumentError for a database in memory, which its connections do not share."""
    if url.database in (None, "", ":memory:") or "uri" in url.query:
        raise ArgumentError(f"{url} names no file")
    return Path(str(url.database))


def writers(url: URL) -> Engine:
    """Connections whose transactions may write. They wait for each other at the beginning, where nothing is lost."""
    return _engine(url, _prepare, "BEGIN IMMEDIATE")


def readers(url: URL) -> Engine:
    """Connections whose transactions only read, in a pool that waiting writers do not use up."""
    return _engine(url, _prepare_reader, "BEGIN")


@contextmanager
def prepared(file: Path) -> Iterator[None]:
    """Switch a file to the write-ahead log; servers that do so at once, and what they do inside, take turns.

    A lock beside the file, because SQLite fails at once, and does not wait, where two connections switch a new file.
    """
    if not file.parent.is_dir():
        raise NotADirectoryError(f"there is no folder {file.parent}")
    with _lock(file):
        with closing(sqlite3.connect(file, timeout=BUSY_SECONDS)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # the file keeps it
        yield


def check_sqlite(path: Path) -> None:
    """Raises StartError for a file that is damaged, no database, or not writable. One that is missing is in order."""
    if not path.exists():
        return
    try:
        with _lock(path), closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA user_version = {version}")  # writes, where the file can be written
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
    """What servers that start at once take turns by."""
    return FileLock(f"{file}.lock")


def _engine(url: URL, prepare: Any, begin: str) -> Engine:
    made = create_engine(url, pool_pre_ping=True, connect_args={"timeout": BUSY_SECONDS})

    def begun(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    event.listen(made, "connect", prepare)
    event.listen(made, "begin", begun)
    return made


def _prepare(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # the driver begins no transactions of its own: the engine does
    connection.execute("PRAGMA synchronous = FULL")  # what is committed is on the disk
    connection.execute("PRAGMA foreign_keys = ON")


def _prepare_reader(connection: Any, record: Any) -> None:
    _prepare(connection, record)
    connection.execute("PRAGMA query_only = ON")
