"""A realtime session: prompts come as they are typed, and the latest one wins.

Every message gets one answer; that of a request is its images, an error, or word that a later request took its place.
One request of a session is at work at a time, beside everything else that the server does. What a device has begun is
finished and shown, so that a client that types faster than images are made still sees some; what only waits gives way.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from service.engine.engine import RequestHandle
from service.errors import (
    Forbidden,
    InvalidRequest,
    Overloaded,
    ServiceError,
    Unauthorized,
    Unavailable,
    to_openai,
)
from service.http.authentication import Authenticator
from service.http.error_handlers import field_error
from service.http.rate_limiter import RateLimiter
from service.images.service import ImageService
from service.observability.metrics import Metrics
from service.schemas import RealtimeRequest, SessionStart
from service.settings import Settings

if TYPE_CHECKING:
    from service.observability.tracing import Tracing

log = logging.getLogger(__name__)

_messages: TypeAdapter[SessionStart | RealtimeRequest] = TypeAdapter(
    Annotated[SessionStart | RealtimeRequest, Field(discriminator="type")]
)
_Answer = tuple[dict[str, Any], Sequence[bytes]]  # a message, and binary ones that follow it


@dataclass
class RealtimeSessions:
    """The open sessions of a server, and what they share."""

    images: ImageService
    authenticator: Authenticator
    rate_limiter: RateLimiter
    settings: Settings
    metrics: Metrics
    tracing: "Tracing | None" = None
    count: int = 0

    @property
    def full(self) -> bool:
        """Whether no more sessions may be opened."""
        return self.count >= self.settings.realtime_limit

    async def serve(self, socket: WebSocket, token: str) -> None:
        """Serve an accepted connection until it is closed. `token` is the API key of its headers, or empty."""
        self.count += 1
        self.metrics.sessions.inc()
        try:
            await RealtimeSession(socket, self, token).run()
        finally:
            self.count -= 1
            self.metrics.sessions.dec()


class RealtimeSession:
    """One accepted connection."""

    def __init__(self, socket: WebSocket, server: RealtimeSessions, token: str) -> None:
        self._socket = socket
        self._server = server
        self._token = token
        self._owner = ""
        self._binary = False
        self._waiting: RealtimeRequest | None = None  # the latest that has not begun
        self._handle = RequestHandle()  # what is at work
        self._making: asyncio.Task[_Answer] | None = None
        self._sending = asyncio.Lock()  # a message and its binary ones stay together

    async def run(self) -> None:
        """Answer until the client leaves, shows no valid key, or says nothing for too long."""
        working: asyncio.Task[None] | None = None
        try:
            while (text := await self._receive()) is not None:
                try:
                    message = self._parse(text)
                    if isinstance(message, SessionStart):
                        self._token = message.api_key or self._token
                    self._owner = await self._identify()
                except (Unauthorized, Forbidden) as error:
                    await self._say(_refusal(error, None, None))
                    await self._close(1008, error.message)
                    return
                except (InvalidRequest, Unavailable) as error:
                    await self._say(_refusal(error, None, None))
                    continue
                if isinstance(message, SessionStart):
                    self._binary = message.frames == "binary"
                    await self._say({"type": "session.started"})
                    continue
                if self._waiting is not None:
                    await self._say(_superseded(self._waiting))
                self._waiting = message
                if working is None or working.done():
                    working = asyncio.create_task(self._work())
                elif self._making is not None and not self._handle.begun:
                    self._making.cancel()
        finally:
            if working is not None:
                working.cancel()
                await asyncio.wait([working])

    async def _receive(self) -> str | None:
        """The next message; None when the client is gone, or was sent away."""
        settings = self._server.settings
        try:
            known = bool(await self._identify())
        except ServiceError:
            known = False  # it must show its key soon
        try:
            async with asyncio.timeout(settings.realtime_idle_seconds if known else settings.body_seconds):
                event = await self._socket.receive()
        except TimeoutError:
            await self._close(1000, "nothing was asked for too long")
            return None
        if event["type"] == "websocket.disconnect":
            return None
        text: str | None = event.get("text")
        if text is None:
            await self._close(1003, "messages are JSON text")
        elif len(text) > settings.max_body_bytes:
            await self._close(1009, f"the message is over the limit of {settings.max_body_bytes} bytes")
            return None
        return text

    async def _identify(self) -> str:
        """Return the owner. Called for every message, because the key may have been revoked. Raises as HTTP does."""
        return await self._server.authenticator.owner(self._token, "generate", self._socket)

    def _parse(self, text: str) -> SessionStart | RealtimeRequest:
        """A message. Raises InvalidRequest as the other routes do."""
        try:
            context = {"unsupported": self._server.settings.unsupported}
            return _messages.validate_python(from_json(text), context=context)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            if first["type"] == "union_tag_invalid":  # pydantic's message repeats the tag
                raise InvalidRequest(f"type must be {first['ctx']['expected_tags']}", "type", "invalid_value") from None
            raise field_error(first["type"], first["loc"][1:] or ["type"], first["msg"]) from None
        except ValueError as error:
            raise InvalidRequest(f"the message is not JSON: {error}", code="invalid_json") from None

    async def _work(self) -> None:
        """Make what waits, until nothing does."""
        while (request := self._waiting) is not None:
            self._waiting, self._handle = None, RequestHandle()
            self._making = asyncio.create_task(self._answer(request))
            try:
                await asyncio.wait([self._making])
            finally:
                self._making.cancel()
            if self._making.cancelled():
                await self._say(_superseded(request))
            else:
                await self._say(*self._making.result())

    async def _answer(self, request: RealtimeRequest) -> _Answer:
        """A request's images or its error; counted and logged like a request of its own."""
        server, began = self._server, time.monotonic()
        request_id = f"req_{secrets.token_hex(12)}"
        owner, status = self._owner, 200
        trace = server.tracing.request("GET", self._socket.headers) if server.tracing else None
        try:
            server.images.engine.check_open()
            generation, output = server.images.resolve(request, owner)
            server.rate_limiter.take(owner, len(generation.seeds))
            images = await server.images.generate(generation, output, self._handle)
            head = {"type": "images.completed", "id": request.id, "request_id": request_id, "seconds": images.seconds}
            content = images.response(texts=() if self._binary else images.texts)
            return head | content.model_dump(exclude_none=True), images.encoded if self._binary else ()
        except ServiceError as error:
            status = to_openai(error)[0]
            return _refusal(error, request.id, request_id), ()
        except Exception:
            status = 500
            log.exception("%s failed", request_id, extra={"request_id": request_id})
            broken = ServiceError(f"something went wrong here; the server's log has it under {request_id}")
            return _refusal(broken, request.id, request_id), ()
        except asyncio.CancelledError:
            status = 499
            raise
        finally:
            seconds = time.monotonic() - began
            server.metrics.requests.labels("/v1/realtime/images", str(status)).inc()
            server.metrics.request_seconds.labels("/v1/realtime/images").observe(seconds)
            if trace:
                trace.answered("/v1/realtime/images", status, request_id)
            told: dict[str, object] = {"request_id": request_id, "owner": owner, "user": request.user}
            if server.settings.log_prompts:
                told["prompt"] = request.prompt
            log.info("realtime %s", status, extra=told | {"seconds": round(seconds, 4)})

    async def _say(self, message: dict[str, Any], frames: Sequence[bytes] = ()) -> None:
        """Send a message and its frames. That a client is gone is found out by the one who listens."""
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the latter after a close
            async with self._sending:
                await self._socket.send_json(message)
                for frame in frames:
                    await self._socket.send_bytes(frame)

    async def _close(self, code: int, reason: str) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await self._socket.close(code, reason)


def _superseded(request: RealtimeRequest) -> dict[str, Any]:
    return {"type": "images.superseded", "id": request.id}


def _refusal(error: ServiceError, answered: str | None, request_id: str | None) -> dict[str, Any]:
    status, body, _ = to_openai(error)
    told = {"type": "error", "id": answered, "request_id": request_id, "status": status, **body}
    return told | ({"retry_after": error.retry_after} if isinstance(error, Overloaded) else {})
