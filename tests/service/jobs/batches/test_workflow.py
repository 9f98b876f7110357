"""`/v1/batches` with the real client, from the upload to the images and the webhook at the end."""

import base64
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from bulk import ENDPOINT, ended, line, read, submit
from engines import Gate
from receiver import SECRET, Receiver, receiving
from running import until

from service.engine.simulator import Simulator
from service.jobs.database import Database
from service.jobs.tables import AnswerRow, BatchRow

KEYS = ("key-of-ann-in-tests", "key-of-bob-in-tests")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving(200) as one:
        yield one


def telling(receiver: Receiver, **jobs) -> dict:
    """Return settings of a server that sends webhooks to a receiver."""
    return {"jobs": {"webhooks": [{"url": receiver.url, "secret": SECRET}], "takeover_seconds": 0.5, **jobs}}


def told(receiver: Receiver, count: int) -> list[tuple[str, str]]:
    """Wait for this many events, and return their types and subjects as the real client reads them."""
    receiver.wait(count)
    unwrap = openai.OpenAI(api_key="none").webhooks.unwrap
    events = [unwrap(body, headers, secret=SECRET) for headers, body in receiver.received]
    return [(event.type, event.data.id) for event in events]


class Touchy:
    """A safety check that raises for its first image, and for every image of a lenient request."""

    def __init__(self):
        self._calls = itertools.count()

    def __call__(self, pixels, moderation):
        if next(self._calls) == 0 or moderation == "low":
            raise LookupError("the detector is unavailable")


def test_lines_of_an_any_step_model_take_steps(serve, connect, tmp_path):
    url = serve(Simulator(0, 0, info=replace(Simulator().info, max_steps=4)), data=tmp_path)
    client = connect(url)
    batch = submit(client, [line("one", seed=7), line("three", seed=7, steps=3)])
    answers = read(client, ended(client, batch.id, "completed", "failed").output_file_id)
    for name, steps in (("one", 1), ("three", 3)):
        linked = httpx.get(answers[name]["response"]["body"]["data"][0]["url"]).content
        posted = client.images.generate(prompt="a red circle", extra_body={"seed": 7, "steps": steps})
        assert linked == base64.b64decode(posted.data[0].b64_json)
    batch = submit(client, [line("five", steps=5)])
    (error,) = ended(client, batch.id, "completed", "failed").errors.data
    assert (error.line, error.param) == (1, "body.steps")


def test_a_batch_is_answered_with_links_to_images(serve, connect, tmp_path, receiver, caplog):
    url = serve(
        Simulator(0, 0, fails_on="bad"),
        data=tmp_path,
        http={"api_keys": KEYS},
        images={"safety": f"{__name__}:Touchy"},
        **telling(receiver, concurrent_lines_per_batch=1),
    )
    ann, bob = (connect(url, key) for key in KEYS)
    seeded = "\ufeff" + json.dumps(line("seeded", seed=7, n=2, output_format="webp"))  # byte order mark of some editors
    lines = [seeded, line("bad", prompt="bad"), line("plain")]
    lines.append(line("unchecked", moderation="low"))
    batch = submit(
        ann, lines, metadata={"project": "x"}, output_expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (batch.status, batch.object, batch.endpoint) == ("validating", "batch", ENDPOINT)
    with pytest.raises(openai.NotFoundError):
        bob.batches.retrieve(batch.id)

    batch = ended(ann, batch.id, "completed", "failed")
    assert batch.status == "completed", batch.errors
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (4, 2, 2)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at < batch.expires_at
    assert (batch.model, batch.metadata) == ("simulator", {"project": "x"})
    assert batch.usage.total_tokens == batch.usage.input_tokens + batch.usage.output_tokens > 0

    output = read(ann, batch.output_file_id)
    assert list(output) == ["seeded", "plain"]
    response = output["seeded"]["response"]
    assert (response["status_code"], output["seeded"]["error"]) == (200, None)
    assert [image["seed"] for image in response["body"]["data"]] == [7, 8]
    image = httpx.get(response["body"]["data"][0]["url"])
    assert (image.status_code, image.headers["content-type"]) == (200, "image/webp")
    errors = read(ann, batch.error_file_id)
    assert list(errors) == ["bad", "unchecked"]
    for error in errors.values():
        assert error["response"]["status_code"] == 500
        assert error["response"]["body"]["error"]["type"] == "server_error"
    response = errors["unchecked"]["response"]
    assert response["request_id"] in response["body"]["error"]["message"]
    assert f"{response['request_id']}, line 4 of {batch.id}, failed" in caplog.text
    assert told(receiver, 1) == [("batch.completed", batch.id)]

    file = ann.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.expires_at) == ("batch_output", batch.completed_at + 3600)
    assert [each.id for each in ann.batches.list(limit=1)] == [batch.id]
    assert list(bob.batches.list()) == []
    with pytest.raises(openai.BadRequestError, match="completed"):
        ann.batches.cancel(batch.id)
    assert ann.files.delete(batch.input_file_id).deleted


def test_invalid_lines_fail_the_batch_with_their_numbers(serve, connect, tmp_path, receiver):
    url = serve(data=tmp_path, http={"max_body_bytes": 10_000}, **telling(receiver, max_batches_per_key=1))
    client = connect(url)
    wrong = [
        line("a"),
        "{not json",
        line("a"),
        "",
        line("b", prompt=""),
        line("c", model="gone"),
        line("d", size="3x3"),
        line("e", response_format="b64_json"),
        line("f") | {"method": "GET"},
        line("g") | {"url": "/v1/images/edits"},
        line("h", priority="interactive"),
        line("i", **{"x" * 500: 1}),
        '{"custom_id": "j", "body": {"seed": %s}}' % ("9" * 5000),
        line("k", prompt="long" * 3000),
        line("never read"),
    ]
    batch = ended(client, submit(client, wrong).id, "failed")
    assert [(error.line, error.code, error.param) for error in batch.errors.data] == [
        (2, "invalid_json_line", None),
        (3, "duplicate_custom_id", "custom_id"),
        (5, "invalid_request", "body.prompt"),
        (6, "model_not_found", "body.model"),
        (7, "invalid_value", "body.size"),
        (8, "invalid_value", "body.response_format"),
        (9, "invalid_method", "method"),
        (10, "invalid_url", "url"),
        (11, "invalid_value", "body.priority"),
        (12, "invalid_request", batch.errors.data[9].param),
        (13, "invalid_json_line", None),
        (14, "line_too_long", None),
    ]
    assert "x" * 201 not in batch.errors.to_json()
    assert batch.errors.data[0].message == "the line is not JSON: key must be a string (character 2)"
    assert "number out of range" in batch.errors.data[10].message
    assert (batch.failed_at is not None, batch.output_file_id, batch.error_file_id) == (True, None, None)
    assert told(receiver, 1) == [("batch.failed", batch.id)]

    missing = {"input_file_id": "file-none", "endpoint": ENDPOINT, "completion_window": "24h"}
    with pytest.raises(openai.NotFoundError) as none:
        client.batches.create(**missing)
    assert none.value.param == "input_file_id"
    with pytest.raises(openai.BadRequestError) as edits:
        client.batches.create(**missing | {"endpoint": "/v1/images/edits"})
    assert edits.value.param == "endpoint"


class OnlyOne(Gate):
    """Generates one image, and further ones only after it is opened."""

    def holds(self, prompts, seeds):
        return super().holds(prompts, seeds) and 1 not in seeds


def test_an_unsupported_field_is_ignored_with_a_warning_if_the_server_is_set_so(serve, connect, tmp_path):
    client = connect(serve(Simulator(0, 0), data=tmp_path, images={"unsupported_fields": "warn"}))
    unsupported = {"quality": "hd", "size": "1024x1024", "seed": -1, "extra_body": {}}
    unsupported |= {"timeout": 5, "priority": "interactive", "partial_images": 1}
    batch = ended(client, submit(client, [line("a", **unsupported)]).id, "completed", "failed")
    assert batch.status == "completed", batch.errors
    body = read(client, batch.output_file_id)["a"]["response"]["body"]
    assert (body["size"], len(body["warnings"])) == ("64x64", len(unsupported))
    assert all(any(name in each for each in body["warnings"]) for name in unsupported)

    batch = ended(client, submit(client, [line("a", quality="hd", n=11)]).id, "completed", "failed")
    assert [(error.param, error.line) for error in batch.errors.data] == [("body.n", 1)]


def test_a_batch_that_is_cancelled_or_expires_reports_every_line(serve, connect, tmp_path, receiver):
    gate = OnlyOne()
    few = telling(receiver, concurrent_lines_per_batch=8, max_batches_per_key=1)
    client = connect(serve(gate, data=tmp_path, engine={"max_batch": 1}, **few))
    batch = submit(client, [line("one", seed=1)] + [line(f"{i}", seed=i) for i in range(10, 20)])
    with pytest.raises(openai.RateLimitError, match="unfinished"):
        client.batches.create(input_file_id=batch.input_file_id, endpoint=ENDPOINT, completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="unfinished"):
        client.files.delete(batch.input_file_id)
    until(lambda: client.batches.retrieve(batch.id).request_counts.completed == 1)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch.id, "cancelled")
    assert list(read(client, batch.output_file_id)) == ["one"]
    errors = read(client, batch.error_file_id)
    assert {each["error"]["code"] for each in errors.values()} == {"batch_cancelled"}
    assert (batch.request_counts.completed, batch.request_counts.failed, len(errors)) == (1, 10, 10)

    late = submit(client, [line("late")])
    a_day_passes(tmp_path, late)
    expired = ended(client, late.id, "expired")
    assert read(client, expired.error_file_id)["late"]["error"]["code"] == "batch_expired"
    assert sorted(told(receiver, 2)) == [("batch.cancelled", batch.id), ("batch.expired", late.id)]
    gate.open.set()


def test_answers_are_kept_if_the_input_file_disappears(serve, connect, tmp_path, receiver):
    gate = OnlyOne()
    client = connect(serve(gate, data=tmp_path, engine={"max_batch": 1}, **telling(receiver)))
    batch = submit(client, [line("one", seed=1), line("two", seed=2)])
    until(lambda: client.batches.retrieve(batch.id).request_counts.completed == 1)
    (tmp_path / "files" / batch.input_file_id).unlink()
    a_day_passes(tmp_path, batch)
    batch = ended(client, batch.id, "failed")
    assert [error.code for error in batch.errors.data] == ["input_file_gone"]
    assert list(read(client, batch.output_file_id)) == ["one"]
    assert (batch.error_file_id, batch.request_counts.completed, batch.request_counts.total) == (None, 1, 2)
    assert told(receiver, 1) == [("batch.failed", batch.id)]
    gate.open.set()


def test_a_batch_without_a_workflow_gets_one(serve, connect, tmp_path):
    client = connect(serve(data=tmp_path, jobs={"takeover_seconds": 1}))
    whole = ended(client, submit(client, [line("one", seed=1), line("two", seed=2)]).id, "completed")
    database = Database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    with database.begin() as session:  # as after restoring a backup that is newer than that of the workflows
        kept = {
            column.name: getattr(session.get_one(BatchRow, whole.id), column.name) for column in BatchRow.__table__.c
        }
        again = {"id": "batch_again", "status": "in_progress", "created_at": 0, "completed": 1, "output_file_id": None}
        session.add(BatchRow(**kept | again))
        session.flush()
        session.add(AnswerRow(batch_id="batch_again", number=1, failed=False, answer=json.dumps({"custom_id": "one"})))
    database.close()
    batch = ended(client, "batch_again", "completed", "failed")
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 2, 0)
    answers = read(client, batch.output_file_id)
    assert answers["one"] == {"custom_id": "one"}  # not generated again
    assert answers["two"]["response"]["body"]["data"][0]["seed"] == 2


def a_day_passes(data: Path, batch) -> None:
    database = Database(f"sqlite:///{data / 'jobs.sqlite'}")
    with database.begin() as session:
        session.get_one(BatchRow, batch.id).expires_at = 0
    database.close()
