"""`Webhooks`: signed events for other servers when a batch or job has ended.

An event is a row that is added in the transaction that ends the batch or job, so that neither exists without the other.
It is delivered at least once: each attempt is a workflow, with growing pauses. A receiver detects duplicates by the
`webhook-id`.
"""

import json
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import httpx2
from sqlalchemy import delete, select
from sqlalchemy.orm import Session
from standardwebhooks import Webhook

from service.errors import without_credentials
from service.jobs.database import Database
from service.jobs.rows import new_id
from service.jobs.tables import DeliveryRow
from service.jobs.workflows import KEPT_SECONDS, Workflows
from service.settings import WebhookEndpoint

log = logging.getLogger(__name__)

# Seconds between two attempts, as Standard Webhooks advises: three days and a half in all.
PAUSES = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
TIMEOUT_SECONDS = 15
SIDE_BY_SIDE = 4
AT_ONCE = 100  # attempts that are started in one call
GONE = 410  # the receiver does not want the event


class Webhooks:
    """The outbox and its delivery. Every method blocks."""

    def __init__(self, database: Database, workflows: Workflows, endpoints: Sequence[WebhookEndpoint]) -> None:
        """Defines its workflow, so create it before they start."""
        self._endpoints = {endpoint.url: endpoint for endpoint in endpoints}
        self._database = database
        self._workflows = workflows
        workflows.define("webhook", self._attempt, SIDE_BY_SIDE)

    def announce(self, session: Session, owner: str, kind: str, subject: str, now: int) -> None:
        """Add an event for every endpoint, in the caller's transaction."""
        event = {"owner": owner, "type": kind, "subject": subject, "created_at": now, "next_at": now}
        session.add_all(DeliveryRow(id=new_id("evt_"), url=url, **event) for url in self._endpoints)

    def begin_due(self, now: int) -> None:
        """Start the attempts that are due. A second call has no effect, because each attempt has its own key."""
        with self._database.read() as session:
            rows = (
                select(DeliveryRow.id, DeliveryRow.attempts)
                .where(DeliveryRow.next_at <= now)
                .order_by(DeliveryRow.next_at)
            )
            due = session.execute(rows.limit(AT_ONCE)).all()
        for event, attempts in due:
            self._workflows.begin("webhook", f"{event}.{attempts}")

    def sweep(self, now: int) -> None:
        """Delete events whose delivery has ended, when their workflows are deleted."""
        with self._database.begin() as session:
            ended = DeliveryRow.next_at.is_(None), DeliveryRow.created_at <= now - KEPT_SECONDS
            session.execute(delete(DeliveryRow).where(*ended))

    def _attempt(self, key: str) -> None:
        """The workflow of one attempt."""
        event, _, attempts = key.partition(".")
        database, stopping = self._database, self._workflows.stopping
        delivery = database.retry_transaction(lambda session: session.get(DeliveryRow, event), stopping, read=True)
        if delivery is None or delivery.attempts != int(attempts) or delivery.next_at is None:
            return
        failure = self._send(delivery)
        database.retry_transaction(lambda session: self._record(session, delivery, failure), stopping)

    def _send(self, delivery: DeliveryRow) -> str | None:
        """Send an event. Returns None if the endpoint has accepted it, else the reason."""
        endpoint = self._endpoints.get(delivery.url)
        if endpoint is None:
            return str(GONE)  # no longer in the settings
        event = {"id": delivery.id, "object": "event", "created_at": delivery.created_at, "type": delivery.type}
        body = json.dumps({**event, "data": {"id": delivery.subject}})
        now = datetime.now(UTC)
        headers = {
            "content-type": "application/json",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(endpoint.secret.get_secret_value()).sign(delivery.id, now, body),
        }
        try:
            answer = httpx2.post(delivery.url, content=body, headers=headers, timeout=TIMEOUT_SECONDS)
        except Exception as error:  # of any kind: the event stays due until an attempt is counted
            return f"{type(error).__name__}: {error}"
        return None if answer.is_success else str(answer.status_code)

    def _record(self, session: Session, delivery: DeliveryRow, failure: str | None) -> None:
        row = session.get(DeliveryRow, delivery.id)
        if row is None or row.attempts != delivery.attempts:
            return  # recorded by an attempt of a server that was considered dead
        now = int(time.time())
        row.attempts += 1
        row.last_error = failure
        endpoint = without_credentials(row.url)
        if failure is None:
            row.delivered_at, row.next_at = now, None
        elif failure == str(GONE) or row.attempts > len(PAUSES):
            row.next_at = None
            log.error("delivery to %s ended without success: %s %s: %s", endpoint, row.type, row.subject, failure)
        else:
            row.next_at = now + PAUSES[row.attempts - 1]
            log.warning("%s did not accept %s of %s: %s", endpoint, row.type, row.subject, failure)
