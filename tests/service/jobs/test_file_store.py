"""`/v1/files` with the real client: only the owner sees a file, until it is deleted or expires."""

import contextlib
import io
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from service.errors import Forbidden
from service.jobs.database import Database
from service.jobs.file_store import FileStore

KEYS = ("key-of-ann-in-tests", "key-of-bob-in-tests")


def test_files_are_kept_for_their_owner(serve, connect, tmp_path):
    url = serve(data=tmp_path, http={"api_keys": KEYS, "max_body_bytes": 2000}, jobs={"max_file_bytes": 3 << 20})
    ann, bob = (connect(url, key) for key in KEYS)
    large = bytes(range(256)) * 8192  # 2 MiB, over the limit of other bodies
    first = ann.files.create(file=("a/../lines \u00e9.jsonl", large), purpose="batch")
    assert (first.bytes, first.filename, first.purpose, first.status) == (
        len(large),
        "lines é.jsonl",
        "batch",
        "processed",
    )
    assert first.expires_at is None
    second = ann.files.create(
        file=("prompts.txt", b"a red circle\n"),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert second.expires_at == second.created_at + 3600

    assert ann.files.retrieve(first.id) == first
    assert ann.files.content(first.id).read() == large
    assert [file.id for file in ann.files.list()] == [second.id, first.id]
    assert [file.id for file in ann.files.list(order="asc", limit=1)] == [
        first.id,
        second.id,
    ]  # the client requests pages
    assert [file.id for file in ann.files.list(purpose="fine-tune")] == [second.id]

    assert list(bob.files.list()) == []
    for ask in (bob.files.retrieve, bob.files.content, bob.files.delete):
        with pytest.raises(openai.NotFoundError, match="no file"):
            ask(first.id)
    assert ann.files.delete(first.id).deleted
    with pytest.raises(openai.NotFoundError):
        ann.files.content(first.id)
    assert [path.name for path in (tmp_path / "files").iterdir()] == [second.id]


def test_invalid_uploads_are_refused(serve, connect, tmp_path):
    url = serve(data=tmp_path, jobs={"max_file_bytes": 1000})
    client = connect(url)
    with pytest.raises(openai.BadRequestError) as empty:
        client.files.create(file=("lines.jsonl", b""), purpose="batch")
    assert (empty.value.param, empty.value.code) == ("file", "empty_file")
    for length in (1001, 1 << 20):  # the size is known after reading, and before
        with pytest.raises(openai.APIStatusError) as large:
            client.files.create(file=("lines.jsonl", b"." * length), purpose="batch")
        assert large.value.status_code == 413
    assert httpx.post(f"{url}/v1/files", json={"purpose": "batch"}).json()["error"]["param"] == "file"
    assert list((tmp_path / "files").iterdir()) == []


def test_reads_are_answered_while_another_program_writes_to_the_database(serve, connect, tmp_path):
    url = serve(data=tmp_path)
    client = connect(url).with_options(timeout=20)
    file = client.files.create(file=("lines.jsonl", b"{}\n"), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/images/generations", completion_window="24h")
    writer = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
    with contextlib.closing(writer), ThreadPoolExecutor(50) as pool:
        writer.execute("BEGIN IMMEDIATE")
        cancel = f"{url}/v1/batches/{batch.id}/cancel"
        waiting = [pool.submit(httpx.post, cancel, timeout=120) for _ in range(50)]
        assert client.files.retrieve(file.id) == file
        assert [each.id for each in client.files.list()] == [file.id]
        assert client.files.content(file.id).read() == b"{}\n"
        assert client.batches.retrieve(batch.id).id == batch.id
        assert [each.id for each in client.batches.list()] == [batch.id]
        assert list(client.fine_tuning.jobs.list()) == []
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.list_events("ftjob-none")
        assert not any(each.done() for each in waiting)
        writer.execute("ROLLBACK")
        assert {each.result().status_code for each in waiting} <= {200, 400}  # 400 once it has ended


def test_a_data_folder_that_becomes_read_only_is_reported(serve, connect, tmp_path):
    client = connect(serve(data=tmp_path))
    (tmp_path / "files").rmdir()
    (tmp_path / "files").symlink_to("/sys")  # not even root may create a file there
    with pytest.raises(openai.InternalServerError) as refused:
        client.files.create(file=("a.txt", b"a red circle"), purpose="batch")
    assert (refused.value.status_code, refused.value.code) == (503, "storage_error")


def test_without_a_data_folder_files_are_refused(serve, connect):
    client = connect(serve())
    with pytest.raises(openai.NotFoundError, match="data folder") as none:
        client.files.list()
    assert none.value.code == "jobs_disabled"


def test_a_quota_limits_the_files_of_a_key_and_expired_files_are_deleted(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    database.migrate()
    files = FileStore(database, tmp_path / "files", max_bytes=10, quota_bytes=15)
    upload = tmp_path / "upload"
    upload.write_bytes(b"1234567890")
    now = int(time.time())

    def add(owner: str) -> str:
        with upload.open("rb") as source:
            kept = files.add(source, owner=owner, purpose="batch", filename="x", now=now, lifetime=3600)
        return kept.id

    first = add("ann")
    with pytest.raises(Forbidden, match="quota of 15"):
        add("ann")
    add("bob")

    class SideBySide(io.BytesIO):
        def read(self, *size: int) -> bytes:
            if not self.tell():
                add("eve")
            return super().read(*size)

    with pytest.raises(Forbidden, match="quota of 15"):
        files.add(SideBySide(b"123456"), owner="eve", purpose="batch", filename="x", now=now, lifetime=3600)
    assert len(list((tmp_path / "files").iterdir())) == 3  # nothing remains of refused uploads
    (tmp_path / "files" / f".{first}.0123456789abcdef.part").write_bytes(b"1")
    (tmp_path / "files" / "letters").mkdir()
    for name in ("letter.txt", "letters/file-1", ".hidden"):  # of somebody else
        (tmp_path / "files" / name).write_bytes(b"1")
    files.sweep(now + 3599)
    assert files.path(first).exists()
    files.sweep(now + 3600)
    theirs = {"letter.txt", "letters", ".hidden"}
    assert {path.name for path in (tmp_path / "files").iterdir()} == {f".{first}.0123456789abcdef.part", *theirs}
    files.sweep(now + 100_000)
    assert {path.name for path in (tmp_path / "files").iterdir()} == theirs
    add("ann")
    database.close()
