"""Transactions and migrations."""

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from old_database import add_old_job, check_upgraded
from sqlalchemy import create_engine, select

from service.errors import StartError, Unavailable
from service.jobs import sqlite
from service.jobs.database import Database
from service.jobs.tables import ExecutorRow, Table


@pytest.fixture
def database(tmp_path) -> Iterator[Callable[[], Database]]:
    """Creates databases on one SQLite file, not migrated yet, and closes them."""
    with contextlib.ExitStack() as stack:
        url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
        yield lambda: stack.enter_context(contextlib.closing(Database(url)))


def test_migrations_create_the_declared_tables(database, tmp_path):
    database().migrate()
    engine = create_engine(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
    engine.dispose()


def test_a_job_of_an_old_database_survives_the_migration(database, tmp_path):
    add_old_job(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    database().migrate()
    check_upgraded(database())


def test_servers_that_start_at_once_take_turns_to_migrate(database):
    databases = [database() for _ in range(8)]
    together = threading.Barrier(8)

    def migrate(one: Database) -> None:
        together.wait()
        one.migrate()

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(migrate, each) for each in databases]:
            done.result()
    with databases[0].read() as session:
        assert session.scalars(select(ExecutorRow)).all() == []


def test_a_new_file_is_prepared_by_one_server_at_a_time(database, tmp_path):
    migrated = threading.Event()

    def migrate() -> None:
        one.migrate()
        migrated.set()

    one = database()
    with ThreadPoolExecutor(1) as pool:
        with sqlite.prepared(tmp_path / "jobs.sqlite"):
            done = pool.submit(migrate)
            assert not migrated.wait(0.2)
        done.result()


def test_readers_do_not_wait_for_writers(database, tmp_path):
    one = database()
    one.migrate()
    writer = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
    with contextlib.closing(writer), ThreadPoolExecutor(20) as pool:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO executors (id, beats) VALUES ('half', 1)")

        def write(number: int) -> None:
            with one.begin() as session:
                session.add(ExecutorRow(id=f"server-{number}", beats=0))

        writing = [pool.submit(write, number) for number in range(20)]
        stopping = threading.Event()
        for _ in range(3):
            with one.read() as session:
                assert session.scalars(select(ExecutorRow)).all() == []
            assert one.retry_transaction(lambda session: session.get(ExecutorRow, "half"), stopping, read=True) is None
        assert not any(each.done() for each in writing)
        writer.execute("ROLLBACK")
        for each in writing:
            each.result()
    with one.read() as session:
        assert len(session.scalars(select(ExecutorRow)).all()) == 20


def test_a_read_transaction_cannot_write_and_its_error_has_no_values(database, caplog):
    one = database()
    one.migrate()
    with pytest.raises(Unavailable) as refused, one.read() as session:
        session.add(ExecutorRow(id="private", beats=0))
    assert "readonly" in caplog.text
    assert "private" not in f"{caplog.text} {refused.value.__cause__}"
    with one.read() as session:
        assert session.scalars(select(ExecutorRow)).all() == []


@pytest.mark.parametrize(
    "url", ["nonsense", "oracle://somewhere", "sqlite:////nowhere/at/all", "sqlite://", "sqlite:///:memory:"]
)
def test_an_unusable_database_is_named(url):
    with pytest.raises(StartError, match="database"):
        Database(url).migrate()
    assert not Path("/nowhere").exists()
