"""Failures of databases, disks, stores and clocks: each gives the error of docs/jobs.md or recovers without loss."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import httpx
import openai
import pytest
from bulk import ENDPOINT, ended, line, read, submit
from engines import Gate
from fine_tuning import ENDLESS, SERVE, TINY, add_job, event_messages, server, until, upload
from fine_tuning import submit as submit_job
from fsspec.implementations.memory import MemoryFileSystem
from old_database import add_old_job, check_upgraded
from running import serving
from sqlalchemy import create_engine, select, text
from worker_threads import worker_threads

from benchmarks import postgres
from service import app
from service.app import create_app
from service.engine.simulator import Simulator
from service.errors import StartError, Unavailable
from service.images.artifacts import THREADS
from service.jobs.database import Database
from service.jobs.jobs import Jobs
from service.jobs.postgres import DeadlineConnection
from service.jobs.rows import new_id
from service.jobs.tables import BatchRow, ExecutorRow, FileRow, JobRow
from service.jobs.workflows import LOOKS, Workflows
from service.settings import Settings


@pytest.fixture(scope="module")
def database() -> Iterator[postgres.Postgres]:
    binaries = postgres.programs()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    with postgres.running(binaries) as running:
        yield running


@pytest.fixture
def empty(database) -> str:
    """The URL of an empty database."""
    name = new_id("empty_")
    engine = create_engine(database.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return database.url.removesuffix("postgres") + name


@contextlib.contextmanager
def process(command: list[str], data: Path, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """Run a server in its own process; `address` waits for it."""
    given = {f"SERVICE_{name.upper()}": value for name, value in settings.items()}
    with subprocess.Popen(
        [*command, "--data", str(data)], env=os.environ | given, stderr=subprocess.PIPE, text=True
    ) as it:
        try:
            yield it
        finally:
            it.kill()


def address(of: subprocess.Popen[str]) -> str:
    said = []
    for words in of.stderr:
        said.append(words)
        if found := re.search(r"http://[\d.:]+", words):
            threading.Thread(target=of.stderr.read, daemon=True).start()  # so that the pipe does not fill up
            return found[0]
    raise AssertionError("".join(said))


def test_a_batch_and_a_job_survive_an_outage_of_the_database(database, teacher, tmp_path, connect):
    backend = Gate()
    settings = {"teachers": {"tiny": str(teacher)}, "takeover_seconds": 1, "nice": 0, "database": database.url}
    with serving(create_app(Settings(data=tmp_path, jobs=settings), worker_threads(backend, device="cpu"))) as url:
        client = connect(url)
        job = submit_job(client, upload(client), ENDLESS)
        job = until(client, job, lambda job: job.images_seen)
        batch = submit(client, [line(str(number), seed=number) for number in range(200)])
        ended(client, batch.id, "in_progress")

        def refuses(ask: Callable[[], object]) -> None:
            with pytest.raises(openai.InternalServerError, match="database does not answer") as away:
                ask()
            assert away.value.status_code == 503
            assert int(away.value.response.headers["retry-after"]) > 0

        writes = (
            lambda: client.batches.create(
                input_file_id=batch.input_file_id, endpoint=ENDPOINT, completion_window="24h"
            ),
            lambda: client.fine_tuning.jobs.cancel(job.id),
            lambda: upload(client),
        )
        with database.read_only():
            for write in writes:
                refuses(write)
            assert client.batches.retrieve(batch.id).status == "in_progress"
            with contextlib.closing(Database(database.url)) as other, pytest.raises(StartError, match="read-only"):
                other.migrate()
        database.stop()
        try:
            for ask in (*writes, lambda: client.batches.retrieve(batch.id)):
                refuses(ask)
            backend.open.set()  # so that answers arrive while the database is stopped
            assert client.images.generate(prompt="a red circle").data[0].b64_json
            assert httpx.get(f"{url}/readyz").status_code == 200
        finally:
            database.start()
        batch = ended(client, batch.id, "completed", "failed")
        assert (batch.status, batch.request_counts.completed) == ("completed", 200), batch.errors
        answers = read(client, batch.output_file_id)
        assert list(answers) == [str(number) for number in range(200)]
        assert answers["7"]["response"]["body"]["data"][0]["seed"] == 7
        assert len(list(client.files.list())) == 3  # of the job, the batch and its output, but not of refused requests

        job = until(client, job, lambda now: now.images_seen > job.images_seen)
        assert (job.status, [words for words in event_messages(client, job) if "crashed" in words]) == ("running", [])
        client.fine_tuning.jobs.cancel(job.id)
        until(client, job, lambda job: job.status == "cancelled")


def test_writers_wait_for_each_other_and_readers_for_nobody(empty, tmp_path):
    jobs = Jobs(tmp_path, Settings(jobs={"database": f"{empty}?options=-c%20lock_timeout%3D100"}))
    jobs.database.migrate()
    name = add_job(jobs, 1, "running")
    with jobs.database.begin() as session:
        session.get_one(JobRow, name, with_for_update=True)
        assert jobs.fine_tuning.get("ann", name).id == name
        assert jobs.fine_tuning.index("ann", name, 1) == ([], False)
        for part in (jobs.fine_tuning.events, jobs.fine_tuning.checkpoints):
            assert part("ann", name, None, 1) == ([], False)
        with pytest.raises(Unavailable):
            jobs.fine_tuning.pause("ann", name)
    with jobs.database.begin("ann"), pytest.raises(Unavailable):  # while a batch is created
        jobs.files.remove("ann", "file-1", 0)
    jobs.database.close()


def test_a_server_is_dead_only_after_several_looks_without_a_heartbeat(database, tmp_path):
    databases = [Database(database.url) for _ in range(3)]
    one, other = (Workflows(each, tmp_path) for each in databases[:2])
    tables = databases[2]
    tables.migrate()

    def counted() -> int:
        with tables.begin() as session:
            return len(session.scalars(select(ExecutorRow)).all())

    before = counted()
    other.beat()
    for _ in range(LOOKS):
        one.beat()
    assert counted() == before + 2
    other.beat()
    for _ in range(LOOKS):
        one.beat()
    assert counted() == before + 2
    one.beat()
    assert counted() == before + 1
    for each in databases:
        each.close()


def test_a_shutdown_does_not_wait_for_a_workflow_that_hangs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(app, "JOBS_SECONDS", 0.1)
    began, ended = threading.Event(), threading.Event()

    def hang(key: str) -> None:
        began.set()
        assert ended.wait(60)

    made = create_app(Settings(data=tmp_path), worker_threads(Simulator(0, 0)))
    workflows = made.state.jobs.workflows
    workflows.define("hang", hang, 1)
    with serving(made):
        workflows.begin("hang", "one")
        assert began.wait(60)
    assert "do not stop within 0.1 s" in caplog.text
    (stopping,) = [thread for thread in threading.enumerate() if thread.name == "jobs-stop"]
    ended.set()
    stopping.join(60)
    assert not stopping.is_alive()


@pytest.mark.parametrize("begun", [True, False])
def test_a_suspended_database_times_out_and_is_used_again(database, monkeypatch, begun):
    monkeypatch.setattr(DeadlineConnection, "answer_seconds", 2.0)
    tables = Database(f"{database.url}?connect_timeout=2")

    def transaction(silent: contextlib.AbstractContextManager[None]) -> None:
        with contextlib.ExitStack() as silence, tables.begin() as session:
            if begun:
                session.execute(text("SELECT 1"))
            silence.enter_context(silent)
            session.execute(text("SELECT 1"))

    transaction(contextlib.nullcontext())  # leaves a connection in the pool
    with pytest.raises(Unavailable):
        transaction(database.silent())
    with tables.begin() as session:
        assert session.scalar(text("SELECT 2")) == 2
    tables.close()


def test_concurrent_servers_create_the_tables_once(empty):
    databases = [Database(empty) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(database.migrate) for database in databases]:
            done.result()
    with databases[0].begin() as session:
        assert session.scalars(select(FileRow)).all() == []
    for database in databases:
        database.close()


def test_a_job_of_an_old_database_survives_the_migration(empty):
    tables = Database(empty)
    add_old_job(tables.url.render_as_string(hide_password=False))
    tables.migrate()
    check_upgraded(tables)
    tables.close()


def test_two_servers_that_start_together_share_an_empty_database(empty, tmp_path, connect):
    with process(SERVE, tmp_path, jobs__database=empty) as one, process(SERVE, tmp_path, jobs__database=empty) as other:
        first, second = (connect(address(each)) for each in (one, other))
        file = upload(first)
        assert [kept.id for kept in second.files.list()] == [file]


def test_a_batch_waits_for_an_unavailable_image_store(serve, connect, tmp_path):
    asked, away = threading.Semaphore(0), threading.Event()

    class Store(MemoryFileSystem):
        """An object store that can be unavailable, with its own kind of exception."""

        protocol, store = "away", {}

        def pipe_file(self, path, value, **options):
            if away.is_set():
                asked.release()
                raise LookupError("no such host")
            super().pipe_file(path, value, **options)

    fsspec.register_implementation("away", Store, clobber=True)
    url = serve(Simulator(0, 0), data=tmp_path, images={"artifacts": "away://images"})
    client = connect(url)
    away.set()
    with pytest.raises(openai.InternalServerError, match="store of linked images does not answer") as refused:
        client.images.generate(prompt="a red circle", response_format="url")
    assert refused.value.status_code == 503
    batch = submit(client, [line(str(number)) for number in range(3)])
    for _ in range(6):
        assert asked.acquire(timeout=60)
    assert client.batches.retrieve(batch.id).status == "in_progress"
    away.clear()
    batch = ended(client, batch.id, "completed", "failed")
    answers = read(client, batch.output_file_id)
    assert list(answers) == ["0", "1", "2"]
    assert httpx.get(answers["2"]["response"]["body"]["data"][0]["url"]).status_code == 200


def test_a_slow_image_store_delays_only_links(serve, connect, tmp_path):
    links = 40  # more than any executor has threads
    entered, answers = threading.Semaphore(0), threading.Event()

    class Store(MemoryFileSystem):
        protocol, store = "slow", {}

        def pipe_file(self, path, value, **options):
            entered.release()
            assert answers.wait(60)
            super().pipe_file(path, value, **options)

    fsspec.register_implementation("slow", Store, clobber=True)
    client = connect(serve(Simulator(0, 0), data=tmp_path, images={"artifacts": "slow://images"}))
    with ThreadPoolExecutor(links) as callers:
        try:
            ask = client.images.generate
            waiting = [callers.submit(ask, prompt="a circle", response_format="url") for _ in range(links)]
            for _ in range(THREADS):
                assert entered.acquire(timeout=60)
            impatient = client.with_options(timeout=30)
            assert impatient.images.generate(prompt="a red circle").data[0].b64_json
            assert impatient.files.retrieve(upload(impatient)).status == "processed"
            assert not any(each.done() for each in waiting)
        finally:
            answers.set()
        assert all(each.result().data[0].url for each in waiting)


def test_an_unavailable_image_store_is_named_at_the_start(tmp_path):
    with pytest.raises(StartError, match=r"artifacts: nowhere://images .*nowhere"):
        create_app(Settings(data=tmp_path, images={"artifacts": "nowhere://images"}), worker_threads(Simulator()))


def test_a_full_disk_refuses_uploads_and_delays_batches(tmp_path, teacher, connect):
    """The server has disks of a few megabytes."""
    mount = "mount -t tmpfs -o size="
    script = f'{mount}24m disk "$0" && mkdir "$0"/distillations && {mount}300k disk "$0"/distillations && exec "$@"'
    confined = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*confined, "true"], capture_output=True).returncode:
        pytest.skip("this system does not allow private mounts")
    teachers = json.dumps({"tiny": str(teacher)})
    with process([*confined, *SERVE], tmp_path, jobs__teachers=teachers, jobs__nice="0") as it:
        client = connect(address(it))
        disk = Path(f"/proc/{it.pid}/root{tmp_path}")
        job = submit_job(client, upload(client), TINY)
        failed = until_failed(client, job)
        assert failed.error.code == "disk_full", failed.error

        lines = [line(str(number)) for number in range(500)]
        content = "\n".join(map(json.dumps, lines)).encode()
        file = client.files.create(file=("lines.jsonl", content), purpose="batch")
        fill(disk / "filler", leave=400 << 10)
        with pytest.raises(openai.InternalServerError) as refused:
            client.files.create(file=("large.jsonl", bytes(1 << 20)), purpose="batch")
        assert (refused.value.status_code, refused.value.code) == (503, "disk_full")
        batch = client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
        pause = threading.Event()
        while free(disk) > 16 << 10:
            pause.wait(0.05)
        (disk / "filler").unlink()
        batch = ended(client, batch.id, "completed", "failed")
        assert list(read(client, batch.output_file_id)) == [str(number) for number in range(500)]


def until_failed(client: openai.OpenAI, job):
    """Wait until the job has failed."""
    pause = threading.Event()
    for _ in range(600):
        if (job := client.fine_tuning.jobs.retrieve(job.id)).status == "failed":
            return job
        pause.wait(0.2)
    raise AssertionError(f"the job is {job.status}: {event_messages(client, job)}")


def free(disk: Path) -> int:
    return shutil.disk_usage(disk).free


def fill(path: Path, leave: int) -> None:
    path.write_bytes(bytes(free(path.parent) - leave))


def test_a_clock_jump_loses_nothing(serve, connect, tmp_path, monkeypatch):
    backend, now, jump = Gate(), time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    client = connect(serve(backend, data=tmp_path, jobs={"takeover_seconds": 0.5}))
    for jump in (0.0, 6 * 3600.0, -6 * 3600.0):  # during the batch, and before the next one
        backend.open.clear()
        batch = submit(client, [line(str(number)) for number in range(20)])
        ended(client, batch.id, "in_progress")
        jump = -jump
        backend.open.set()
        batch = ended(client, batch.id, "completed", "failed", "expired")
        assert (batch.status, batch.request_counts.completed) == ("completed", 20)
        assert len(read(client, batch.output_file_id)) == 20


def test_expired_and_missing_files_are_named(connect, tmp_path, teacher):
    with server(tmp_path, {"tiny": str(teacher)}) as url:
        client = connect(url)
        expired, gone = (upload(client, purpose=purpose) for purpose in ("batch", "batch"))
        unread, stale = (upload(client) for _ in range(2))
        database = Database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
        with database.begin() as session:  # an hour passes
            for name in (expired, stale):
                session.get_one(FileRow, name).expires_at = 1
        database.close()
        for name in (gone, unread):
            (tmp_path / "files" / name).unlink()

        with pytest.raises(openai.NotFoundError) as refused:
            client.batches.create(input_file_id=expired, endpoint=ENDPOINT, completion_window="24h")
        assert (refused.value.param, refused.value.code) == ("input_file_id", "file_not_found")
        with pytest.raises(openai.NotFoundError) as refused:
            submit_job(client, stale, TINY)
        assert (refused.value.param, refused.value.code) == ("training_file", "file_not_found")

        batch = client.batches.create(input_file_id=gone, endpoint=ENDPOINT, completion_window="24h")
        (error,) = ended(client, batch.id, "failed").errors.data
        assert (error.code, error.param) == ("input_file_gone", "input_file_id")
        error = until_failed(client, submit_job(client, unread, TINY)).error
        assert (error.code, error.param) == ("file_not_found", "training_file")


def test_a_missing_teacher_fails_a_queued_job(connect, tmp_path, teacher):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    with server(tmp_path / "data", {"gone": str(folder), "unknown": str(folder)}) as url:
        client = connect(url)
        file = upload(client)
        ids = {}
        for name in ("gone", "unknown"):
            job = client.fine_tuning.jobs.create(model=name, training_file=file, extra_body={"distillation": TINY})
            ids[name] = client.fine_tuning.jobs.pause(job.id).id
        shutil.rmtree(folder)
    with server(tmp_path / "data", {"gone": str(folder)}) as url:
        client = connect(url)
        for name, code in (("gone", "model_gone"), ("unknown", "model_not_found")):
            client.fine_tuning.jobs.resume(ids[name])
            error = until_failed(client, client.fine_tuning.jobs.retrieve(ids[name])).error
            assert (error.code, error.param) == (code, "model")
            assert str(tmp_path) not in error.message


def test_limits_of_a_key_hold_for_concurrent_requests(empty, teacher, tmp_path, connect):
    tables = Database(empty)
    settings = {"teachers": {"tiny": str(teacher)}, "max_batches_per_key": 1, "max_jobs_per_key": 1}
    settings |= {"max_file_bytes_per_key": 1000, "database": empty}

    def waiting() -> int:
        with tables.begin() as session:
            locks = "pg_locks JOIN pg_database ON pg_database.oid = database WHERE datname = current_database()"
            return session.scalar(text(f"SELECT count(*) FROM {locks} AND locktype = 'advisory' AND NOT granted"))

    def other(row: FileRow | BatchRow | JobRow, ask: Callable[[], object]) -> openai.APIStatusError:
        """Return the error of a request while another server is about to add a row."""
        with tables.begin("another"), tables.begin("127.0.0.1") as session:
            answer = pool.submit(ask)
            while not waiting():
                assert not answer.done()
            session.add(row)
        return answer.exception()

    with serving(create_app(Settings(data=tmp_path, jobs=settings), worker_threads(Gate(), device="cpu"))) as url:
        client = connect(url)
        lines, prompts = upload(client, json.dumps(line("a")), purpose="batch"), upload(client)
        common = {"owner": "127.0.0.1", "created_at": int(time.time())}
        batch = BatchRow(id="batch_1", status="in_progress", endpoint=ENDPOINT, input_file_id=lines, links="", **common)
        batch.completion_window, batch.expires_at = "24h", common["created_at"] + 1000
        job = JobRow(id="ftjob-1", status="queued", model="tiny", training_file=prompts, seed=1, **common)
        job.hyperparameters, job.distillation, job.result_files = {"batch_size": "auto"}, {}, []
        job.details = {'"a".b\\[0]': "é"}
        file = FileRow(id="file-1", purpose="batch", filename="big", bytes=900, **common)
        with ThreadPoolExecutor(1) as pool:
            order = {"input_file_id": lines, "endpoint": ENDPOINT, "completion_window": "24h"}
            assert other(batch, lambda: client.batches.create(**order)).code == "too_many"
            assert other(job, lambda: submit_job(client, prompts, TINY)).code == "job_quota_exceeded"
            assert [kept.id for kept in client.fine_tuning.jobs.list(metadata=job.details)] == [job.id]
            assert client.fine_tuning.jobs.list(metadata={'a"b': "c"}).data == []
            assert other(file, lambda: upload(client)).code == "quota_exceeded"
    tables.close()
