"""`Database`: transactions on SQLite in one file, or on PostgreSQL by URL."""

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from sqlalchemy import make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError, TimeoutError
from sqlalchemy.orm import Session, sessionmaker

from service.backoff import backoff
from service.errors import StartError, Unavailable
from service.jobs import sqlite

T = TypeVar("T")

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).with_name("migrations")
MIGRATION_LOCK = 0x66676D  # arbitrary keys of advisory locks, the same in every server
OWNERS_LOCK = 0x66676E
LONGEST_PAUSE = 5.0  # seconds between two attempts while the database is unavailable


class Stopping(BaseException):
    """Raised in a workflow if the server shuts down. Not an `Exception`, so that the workflow stays unfinished."""


class Database:
    """Transactions on the tables of `service.jobs.tables`. Every method blocks: call them off the event loop."""

    def __init__(self, url: str) -> None:
        """`url` is one of SQLAlchemy. Nothing is connected yet. Raises StartError for an invalid one."""
        try:
            self.url = make_url(url)
            self.is_sqlite = self.url.get_backend_name() == "sqlite"
            if self.is_sqlite:
                self._file = sqlite.file_of(self.url)
                self._engine, self._readers = sqlite.writers(self.url), sqlite.readers(self.url)
            elif self.url.get_backend_name() == "postgresql":
                from service.jobs import postgres  # imports psycopg, which SQLite does not need

                self.url = postgres.with_keepalives(self.url)
                self._engine = self._readers = postgres.engine(self.url)
            else:
                raise ArgumentError(f"{self.url.drivername} is neither SQLite nor PostgreSQL")
        except ArgumentError as error:
            raise StartError(f"database: {error}; name it as sqlite:////srv/jobs.sqlite or postgresql://...") from None
        self._writing = sessionmaker(self._engine, expire_on_commit=False)
        self._reading = sessionmaker(self._readers, expire_on_commit=False)

    def migrate(self) -> None:
        """Migrate the tables to this version, one server at a time. Raises StartError."""
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        try:
            with sqlite.prepared(self._file) if self.is_sqlite else nullcontext(), self._engine.begin() as connection:
                if not self.is_sqlite:
                    from service.jobs.postgres import check_writable, remove_deadline

                    check_writable(connection)
                    remove_deadline(connection)
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except CommandError as error:
            raise StartError(f"the database {self.url!r} is of another version of the service: {error}") from None
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            reason = " ".join(str(getattr(error, "orig", None) or error).split())
            raise StartError(f"the database {self.url!r} cannot be used: {reason}") from None

    @contextmanager
    def begin(self, owner: str | None = None) -> Iterator[Session]:
        """Begin a transaction: committed at the end, rolled back by an exception. Raises Unavailable.

        Transactions of the same `owner` run one after another, so that each can count rows before it adds one.
        """
        with self._transaction(self._writing) as session:
            if owner is not None and not self.is_sqlite:  # SQLite has one writer at a time anyway
                lock = text("SELECT pg_advisory_xact_lock(:space, hashtext(:owner))")
                session.execute(lock, {"space": OWNERS_LOCK, "owner": owner})
            yield session

    def read(self) -> AbstractContextManager[Session]:
        """Begin a read-only transaction, which does not wait for writers. Raises Unavailable."""
        return self._transaction(self._reading)

    def retry_transaction(self, work: Callable[[Session], T], stopping: threading.Event, *, read: bool = False) -> T:
        """Return the result of `work` in a transaction, retried while the database is unavailable. Raises Stopping.

        This is for workflows, which can wait. `work` may run again after a commit whose confirmation was lost, so it
        must tolerate its own traces. `read` is for work that only reads.
        """
        pauses = backoff(0.1, LONGEST_PAUSE, jitter=0.5)
        while True:
            try:
                with self.read() if read else self.begin() as session:
                    return work(session)
            except Unavailable:
                if stopping.wait(next(pauses)):
                    raise Stopping from None

    def close(self) -> None:
        self._engine.dispose()
        self._readers.dispose()

    @contextmanager
    def _transaction(self, sessions: sessionmaker[Session]) -> Iterator[Session]:
        try:
            with sessions.begin() as session:
                yield session
        except SQLAlchemyError as error:
            if not _is_outage(error):
                raise
            log.warning("the database does not answer: %s", getattr(error, "orig", None) or error)
            raise Unavailable("the server's database does not answer; try again") from error


def _is_outage(error: SQLAlchemyError) -> bool:
    """Whether the database is at fault, and not the statement. TimeoutError: all connections of the pool are in use."""
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    return lost or isinstance(error, OperationalError | TimeoutError)
