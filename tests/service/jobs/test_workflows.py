"""The database and its workflows: migrations side by side, and work that a killed process left."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, select

from service.errors import StartError, Unavailable
from service.jobs import sqlite
from service.jobs.database import Database
from service.jobs.jobs import Jobs
from service.jobs.tables import ExecutorRow, Table
from service.settings import Settings

KILLED = """
import os, pathlib, signal, sys
from service.jobs.jobs import Jobs
from service.settings import Settings

folder = pathlib.Path(sys.argv[1])
jobs = Jobs(folder, Settings())

def count(key):
    def first():
        with open(folder / "steps", "a") as file:
            file.write("first ")
        return "kept"
    jobs.workflows.step("first", first)
    os.kill(os.getpid(), signal.SIGKILL)

jobs.workflows.define("count", count, 1)
jobs.start()
jobs.workflows.begin("count", "one")
signal.pause()
"""


@pytest.fixture
def database(tmp_path) -> Iterator[Callable[[], Database]]:
    """Makes databases on one SQLite file, not migrated yet, and closes them."""
    with contextlib.ExitStack() as stack:
        url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
        yield lambda: stack.enter_context(contextlib.closing(Database(url)))


@pytest.fixture
def jobs_of(tmp_path) -> Iterator[Callable[[], Jobs]]:
    """Makes `Jobs` in one folder, not started yet, and stops the last one, which a test may have done before."""
    made: list[Jobs] = []

    def make() -> Jobs:
        made.append(Jobs(tmp_path, Settings(jobs={"takeover_seconds": 0.5})))
        return made[-1]

    yield make
    if made and made[-1].open:
        made[-1].stop()


def test_migrations_make_the_tables_that_the_code_declares(database, tmp_path):
    database().migrate()
    engine = create_engine(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
    engine.dispose()


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


def test_reading_waits_for_no_writer_however_many_wait_for_each_other(database, tmp_path):
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


def test_a_transaction_that_reads_cannot_write(database):
    one = database()
    one.migrate()
    with pytest.raises(Unavailable), one.read() as session:
        session.add(ExecutorRow(id="one", beats=0))
    with one.read() as session:
        assert session.scalars(select(ExecutorRow)).all() == []


@pytest.mark.parametrize(
    "url", ["nonsense", "oracle://somewhere", "sqlite:////nowhere/at/all", "sqlite://", "sqlite:///:memory:"]
)
def test_a_database_that_cannot_be_is_named(url):
    with pytest.raises(StartError, match="database"):
        Database(url).migrate()
    assert not Path("/nowhere").exists()


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/proc", "/dev/null"])
def test_a_folder_that_cannot_be_made_or_written_is_named(folder):
    with pytest.raises(StartError, match=f"the folder {folder} cannot be created or written"):
        Jobs(Path(folder), Settings())


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"x" * 4096)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"no database" * 1000),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        _overwrite,
    ],
)
@pytest.mark.parametrize("name", ["jobs.sqlite", "workflows.sqlite"])
def test_a_damaged_database_is_named_before_anything_starts(tmp_path, name, damage):
    jobs = Jobs(tmp_path, Settings())
    jobs.prepare()
    jobs.database.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "workflows.sqlite")) as workflows:
        workflows.execute("CREATE TABLE steps (name TEXT)")
    jobs.prepare()
    jobs.database.close()
    damage(tmp_path / name)
    with pytest.raises(StartError, match=f"{name} cannot be used"):
        jobs.prepare()


def test_what_a_killed_process_began_another_one_ends_and_repeats_no_step(jobs_of, tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    jobs = jobs_of()
    steps = tmp_path / "steps"
    ended = threading.Event()

    def count(key: str) -> None:
        assert key == "one"
        assert jobs.workflows.step("first", lambda: steps.write_text("again")) == "kept"
        ended.set()

    jobs.workflows.define("count", count, 1)
    jobs.start()
    assert ended.wait(30)
    jobs.stop()
    assert steps.read_text() == "first "


def test_a_workflow_that_is_stopped_goes_on_at_the_next_start(jobs_of):
    began, ended = threading.Event(), threading.Event()

    def patient(key: str) -> None:
        began.set()
        jobs.workflows.wait(3600)

    jobs = jobs_of()
    jobs.workflows.define("patient", patient, 1)
    jobs.start()
    jobs.workflows.begin("patient", "one")
    jobs.workflows.begin("patient", "one")  # is begun once
    assert began.wait(30)
    jobs.stop()

    jobs = jobs_of()
    jobs.workflows.define("patient", lambda key: ended.set(), 1)
    jobs.start()
    assert ended.wait(30)
    jobs.stop()


def test_a_server_leaves_to_others_what_it_does_not_run(jobs_of):
    ran: list[str] = []
    done = threading.Event()

    def start(runs: bool) -> Jobs:
        def note(key: str) -> None:
            ran.append(key)
            done.set()

        jobs = jobs_of()
        jobs.workflows.define("heavy", note, 1, runs=runs)
        jobs.workflows.define("light", note, 1)
        jobs.start()
        return jobs

    jobs = start(runs=False)
    jobs.workflows.begin("heavy", "one")
    for key in ("two", "three", "four"):  # each a look at the queues later
        done.clear()
        jobs.workflows.begin("light", key)
        assert done.wait(30)
    jobs.stop()
    assert ran == ["two", "three", "four"]

    done.clear()
    jobs = start(runs=True)
    assert done.wait(30)
    jobs.stop()
    assert ran[3:] == ["one"]
