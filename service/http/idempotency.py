"""Answers stored by `Idempotency-Key`, so that a client may retry a request without a second image."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from fastapi import Response

from service.errors import InvalidRequest

IDEMPOTENCY_SECONDS = 3600.0  # for which an answer is kept


@dataclass
class _Entry:
    fingerprint: str
    expires: float
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    response: Response | None = None  # None while it is computed, and after a failure


class IdempotencyStore:
    """Successful answers by caller and key, bounded in time and bytes; the oldest goes first. For one event loop."""

    def __init__(self, lifetime: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._lifetime = lifetime
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._held_bytes = 0

    async def run_once(
        self, caller: str, key: str, fingerprint: str, answer: Callable[[], Awaitable[Response]]
    ) -> Response:
        """Return the key's stored answer, or compute and store it. Concurrent requests wait for the first one.

        A failure is not stored: the next request with the key tries again. `fingerprint` identifies the request; the
        same key with another fingerprint raises InvalidRequest.
        """
        self._forget()
        while (entry := self._entries.get((caller, key))) is not None:
            if entry.fingerprint != fingerprint:
                message = "this Idempotency-Key was used with another request; take a new key"
                raise InvalidRequest(message, "Idempotency-Key", "idempotency_key_reused")
            await entry.answered.wait()
            if entry.response is not None:
                return _again(entry.response)
        entry = self._entries[caller, key] = _Entry(fingerprint, self._clock() + self._lifetime)
        try:
            entry.response = await answer()
            self._held_bytes += len(entry.response.body)
        except BaseException:
            del self._entries[caller, key]
            raise
        finally:
            entry.answered.set()
        self._forget()
        return entry.response

    def _forget(self) -> None:
        """Drop expired answers, and the oldest ones while their total size is over the limit."""
        for name, entry in list(self._entries.items()):
            if entry.response is None:
                continue  # not answered yet
            if self._clock() < entry.expires and self._held_bytes <= self._max_bytes:
                break
            self._held_bytes -= len(entry.response.body)
            del self._entries[name]


def _again(response: Response) -> Response:
    """Return a copy, because the server writes each request's id into the headers."""
    headers = {name: value for name, value in response.headers.items() if name != "server-timing"}
    return Response(response.body, response.status_code, headers | {"idempotent-replayed": "true"})
