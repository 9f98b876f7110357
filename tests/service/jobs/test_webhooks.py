"""Webhooks: events that the real client verifies, retried until they are accepted."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from receiver import SECRET, receiving
from sqlalchemy import select

from service.errors import StartError
from service.jobs.jobs import Jobs
from service.jobs.tables import DeliveryRow
from service.jobs.webhooks import GONE, PAUSES
from service.jobs.workflows import KEPT_SECONDS
from service.settings import Settings
from service.settings_reader import read_settings

NOBODY = "http://a..b/"  # a valid URL that no client can request


@contextmanager
def running(folder: Path, *urls: str) -> Iterator[Jobs]:
    jobs = Jobs(
        folder, Settings(jobs={"takeover_seconds": 1e6, "webhooks": [{"url": url, "secret": SECRET} for url in urls]})
    )
    jobs.start()
    yield jobs
    jobs.stop()


def announce(jobs: Jobs, now: int) -> None:
    with jobs.database.begin() as session:
        jobs.webhooks.announce(session, "me", "fine_tuning.job.succeeded", "ftjob-1", now)
    jobs.webhooks.begin_due(now)


def deliveries(jobs: Jobs) -> list[DeliveryRow]:
    with jobs.database.begin() as session:
        return list(session.scalars(select(DeliveryRow)))


def until(condition) -> None:
    while not condition():
        threading.Event().wait(0.02)


def test_every_endpoint_gets_an_event_that_the_real_client_verifies(tmp_path):
    with receiving(204) as one, receiving(200) as other, running(tmp_path, one.url, other.url, NOBODY) as jobs:
        announce(jobs, 1_700_000_000)
        for receiver in (one, other):
            receiver.wait(1)
            headers, body = receiver.received[0]
            event = openai.OpenAI(api_key="none").webhooks.unwrap(body, headers, secret=SECRET)
            assert (event.type, event.data.id, event.object) == ("fine_tuning.job.succeeded", "ftjob-1", "event")
            assert event.created_at == 1_700_000_000
            assert event.id == headers["webhook-id"]
            with pytest.raises(openai.InvalidWebhookSignatureError):
                openai.OpenAI(api_key="none").webhooks.unwrap(body + b" ", headers, secret=SECRET)
        until(lambda: all(row.attempts for row in deliveries(jobs)))
        left = {row.url: (row.delivered_at is not None, row.next_at is not None) for row in deliveries(jobs)}
        assert left == {one.url: (True, False), other.url: (True, False), NOBODY: (False, True)}


def test_a_failed_delivery_is_retried_when_it_is_due(tmp_path):
    with receiving(500, 302, 200) as receiver, running(tmp_path, receiver.url) as jobs:
        announce(jobs, 1_000)
        for attempt, failure in enumerate(("500", "302"), start=1):
            until(lambda attempt=attempt: deliveries(jobs)[0].attempts == attempt)
            (row,) = deliveries(jobs)
            assert row.last_error == failure
            jobs.webhooks.begin_due(row.next_at - 1)
            assert len(receiver.received) == attempt
            jobs.webhooks.begin_due(row.next_at)
            jobs.webhooks.begin_due(row.next_at)  # starts only once
            receiver.wait(attempt + 1)
        until(lambda: deliveries(jobs)[0].delivered_at)
        assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1
        assert len({body for _, body in receiver.received}) == 1


@pytest.mark.parametrize("attempts", [0, len(PAUSES)])
def test_delivery_ends_after_the_last_attempt_or_410(tmp_path, attempts):
    with receiving(GONE if attempts == 0 else 500) as receiver, running(tmp_path, receiver.url) as jobs:
        with jobs.database.begin() as session:
            jobs.webhooks.announce(session, "me", "batch.failed", "batch_1", 1_000)
            session.flush()
            session.scalars(select(DeliveryRow)).one().attempts = attempts
        jobs.webhooks.begin_due(1_000)
        until(lambda: deliveries(jobs)[0].next_at is None)
        assert deliveries(jobs)[0].delivered_at is None
        for now, kept in ((KEPT_SECONDS + 999, 1), (KEPT_SECONDS + 1_000, 0)):
            jobs.webhooks.sweep(now)
            assert len(deliveries(jobs)) == kept


@pytest.mark.parametrize(
    ("url", "secret"),
    [("https://example.org", secret) for secret in ("plain", "whsec_short", "whsec_" + "!" * 40)]
    + [(url, SECRET) for url in ("example.org", "http://[::1", "http:///hook", "http://localhost:99999/")],
)
def test_an_invalid_endpoint_is_refused(url, secret):
    with pytest.raises(StartError, match="webhooks"):
        read_settings({"webhooks": [{"url": url, "secret": secret}]})
