"""Answers stored by `Idempotency-Key`, so that a client may retry a request without a second image."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

from cachetools import TTLCache
from fastapi import Response

from service.errors import InvalidRequest

IDEMPOTENCY_SECONDS = 3600.0  # for which an answer is kept
_Name = tuple[str, str]  # a caller and one of its keys


class IdempotencyStore:
    """Successful answers by caller and key, bounded in time and bytes. For one event loop."""

    def __init__(self, lifetime: float, max_bytes: int) -> None:
        self._answers: TTLCache[_Name, tuple[str, Response]] = TTLCache(
            max_bytes, lifetime, getsizeof=lambda answer: len(answer[1].body)
        )
        self._locks: WeakValueDictionary[_Name, asyncio.Lock] = WeakValueDictionary()  # of requests in progress

    async def run_once(
        self, caller: str, key: str, fingerprint: str, answer: Callable[[], Awaitable[Response]]
    ) -> Response:
        """Return the key's stored answer, or compute and store it. Concurrent requests wait for the first one.

        A failure is not stored: the next request with the key tries again. `fingerprint` identifies the request; the
        same key with another fingerprint raises InvalidRequest.
        """
        name = caller, key
        async with self._locks.setdefault(name, asyncio.Lock()):
            if (stored := self._answers.get(name)) is not None:
                if stored[0] != fingerprint:
                    message = "this Idempotency-Key was used with another request; take a new key"
                    raise InvalidRequest(message, "Idempotency-Key", "idempotency_key_reused")
                return _again(stored[1])
            response = await answer()
            with contextlib.suppress(ValueError):  # larger than the whole store
                self._answers[name] = fingerprint, response
            return response


def _again(response: Response) -> Response:
    """Return a copy, because the server writes each request's id into the headers."""
    headers = {name: value for name, value in response.headers.items() if name != "server-timing"}
    return Response(response.body, response.status_code, headers | {"idempotent-replayed": "true"})
