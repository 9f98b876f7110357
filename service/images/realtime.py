"""Realtime sessions: a client sends its prompt while it is typed, and a later request replaces an earlier one.

Every message gets one answer. That of a request is its images, an error, or the notice that a later request superseded
it. A session has one running request. A request that a device has started is finished and sent, so that a client that
types faster than images are generated still gets some; a request that only waits is superseded.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from service.engine.dispatcher import RequestHandle
from service.errors import Forbidden, InvalidRequest, Overloaded, ServiceError, Unauthorized, Unavailable, to_openai
from service.http.authentication import Authenticator
from service.http.error_handlers import field_error
from service.http.middleware import BODY_SECONDS
from service.http.rate_limiter import RateLimiter
from service.images.service import ImageService
from service.observability.metrics import Metrics
from service.observability.request_id import new_request_id
from service.schemas import MAX_ID_CHARACTERS, RealtimeRequest, SessionStart
from service.settings import Settings

if TYPE_CHECKING:
    from service.observability.tracing import RequestTrace, Tracing

log = logging.getLogger(__name__)

ROUTE = "/v1/realtime/images"  # in metrics and traces
_messages: TypeAdapter[SessionStart | RealtimeRequest] = TypeAdapter(
    Annotated[SessionStart | RealtimeRequest, Field(discriminator="type")]
)
_Messages = tuple[dict[str, Any], Sequence[bytes]]  # a message, and the binary ones that follow it


@dataclass
class RealtimeSessions:
    """The open sessions of a server, and the objects that they share."""

    images: ImageService
    authenticator: Authenticator
    rate_limiter: RateLimiter
    settings: Settings
    metrics: Metrics
    tracing: "Tracing | None" = None
    count: int = 0

    def check_room(self) -> None:
        """Raise Forbidden if the server takes no further session."""
        most = self.settings.http.max_realtime_sessions
        if self.count >= most:
            message = f"the server takes {most} realtime sessions at a time; close one, or try again later"
            raise Forbidden(message, code="too_many_sessions")

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
        self._pending: RealtimeRequest | None = None  # the latest that has not started
        self._handle = RequestHandle()  # of the running request
        self._running: asyncio.Task[_Messages] | None = None
        self._sending = asyncio.Lock()  # keeps a message and its binary ones together

    async def run(self) -> None:
        """Answer until the client disconnects, has no valid key, or is idle for too long."""
        working: asyncio.Task[None] | None = None
        try:
            while (text := await self._receive()) is not None:
                began = time.monotonic()
                try:
                    message = self._parse(text)
                    if isinstance(message, SessionStart):
                        self._token = message.api_key or self._token
                    self._owner = await self._identify()
                except (Unauthorized, Forbidden, InvalidRequest, Unavailable) as error:
                    request_id = new_request_id()
                    known = {"owner": self._owner} if self._owner else {}
                    self._record(request_id, to_openai(error)[0], began, self._trace(), known)
                    await self._send(_error_message(error, _id_of(text), request_id))
                    if isinstance(error, Unauthorized | Forbidden):
                        await self._close(1008, error.message)
                        return
                    continue
                if isinstance(message, SessionStart):
                    self._binary = message.frames == "binary"
                    await self._send({"type": "session.started"})
                    continue
                if self._pending is not None:
                    await self._send(_superseded(self._pending))
                self._pending = message
                if working is None or working.done():
                    working = asyncio.create_task(self._work())
                elif self._running is not None and not self._handle.begun:
                    self._running.cancel()
        finally:
            if working is not None:
                working.cancel()
                await asyncio.wait([working])

    async def _receive(self) -> str | None:
        """Return the next message; None after the connection was closed."""
        settings = self._server.settings
        try:
            known = bool(await self._identify())
        except ServiceError:
            known = False  # its key must follow soon
        try:
            async with asyncio.timeout(settings.http.realtime_idle_seconds if known else BODY_SECONDS):
                event = await self._socket.receive()
        except TimeoutError:
            await self._close(1000, "the session was idle for too long")
            return None
        if event["type"] == "websocket.disconnect":
            return None
        text: str | None = event.get("text")
        if text is None:
            await self._close(1003, "messages are JSON text")
        elif len(text) > settings.http.max_body_bytes:
            await self._close(1009, f"the message is over the limit of {settings.http.max_body_bytes} bytes")
            return None
        return text

    async def _identify(self) -> str:
        """Return the owner. Called for every message, because the key may have been revoked. Raises as HTTP does."""
        return await self._server.authenticator.owner(self._token, "generate", self._socket)

    def _parse(self, text: str) -> SessionStart | RealtimeRequest:
        """Parse a message. Raises InvalidRequest as the other routes do."""
        try:
            context = {"unsupported": self._server.settings.images.unsupported_fields}
            return _messages.validate_python(from_json(text), context=context)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            if first["type"] in ("union_tag_invalid", "union_tag_not_found"):  # pydantic's message repeats the tag
                message = "type must be 'session.start' or 'images.generate'"
                raise InvalidRequest(message, "type", "invalid_value") from None
            if not first["loc"]:
                raise InvalidRequest("the message must be a JSON object", code="invalid_json") from None
            raise field_error(first["type"], first["loc"][1:], first["msg"]) from None
        except ValueError as error:
            raise InvalidRequest(f"the message is not JSON: {error}", code="invalid_json") from None

    async def _work(self) -> None:
        """Answer pending requests until there is none."""
        while (request := self._pending) is not None:
            self._pending, self._handle = None, RequestHandle()
            self._running = asyncio.create_task(self._answer(request))
            try:
                await asyncio.wait([self._running])
            finally:
                self._running.cancel()
            if self._running.cancelled():
                await self._send(_superseded(request))
            else:
                await self._send(*self._running.result())

    async def _answer(self, request: RealtimeRequest) -> _Messages:
        """Return a request's images or its error. It is counted and logged like an HTTP request."""
        server, began = self._server, time.monotonic()
        request_id, trace = new_request_id(), self._trace()
        owner, status = self._owner, 200
        try:
            server.images.engine.check_open()
            async with server.images.engine.catalog.use(request.model, request.lora.name if request.lora else None):
                generation, output = server.images.resolve(request, owner)
                server.rate_limiter.take(owner, len(generation.seeds))
                images = await server.images.generate(generation, output, self._handle)
            head = {"type": "images.completed", "id": request.id, "request_id": request_id, "seconds": images.seconds}
            content = images.response(texts=() if self._binary else images.texts)
            return head | content.model_dump(exclude_none=True), images.encoded if self._binary else ()
        except ServiceError as error:
            status = to_openai(error)[0]
            return _error_message(error, request.id, request_id), ()
        except Exception:
            status = 500
            log.exception("%s failed", request_id, extra={"request_id": request_id})
            failed = ServiceError(f"the server failed; its log has the error under {request_id}")
            return _error_message(failed, request.id, request_id), ()
        except asyncio.CancelledError:
            status = 499
            raise
        finally:
            extra: dict[str, object] = {"owner": owner, "user": request.user}
            if server.settings.observability.log_prompts:
                extra["prompt"] = request.prompt
            self._record(request_id, status, began, trace, extra)

    def _trace(self) -> "RequestTrace | None":
        return self._server.tracing.request("GET", self._socket.headers) if self._server.tracing else None

    def _record(
        self,
        request_id: str,
        status: int,
        began: float,
        trace: "RequestTrace | None",
        extra: Mapping[str, object] = {},
    ) -> None:
        """Count a message that is answered, log it, and end its trace."""
        seconds = time.monotonic() - began
        self._server.metrics.requests.labels(ROUTE, str(status)).inc()
        self._server.metrics.request_seconds.labels(ROUTE).observe(seconds)
        if trace:
            trace.finish(ROUTE, status, request_id)
        log.info("realtime %s", status, extra={"request_id": request_id, **extra, "seconds": round(seconds, 4)})

    async def _send(self, message: dict[str, Any], frames: Sequence[bytes] = ()) -> None:
        """Send a message and its frames. The receiving side notices a client that has disconnected."""
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


def _id_of(text: str) -> str | None:
    """Return the valid `id` of a message that may be invalid otherwise; None if it has none."""
    with contextlib.suppress(ValueError):
        content = from_json(text)
        given = content.get("id") if isinstance(content, dict) else None
        if isinstance(given, str) and len(given) <= MAX_ID_CHARACTERS:
            return given
    return None


def _error_message(error: ServiceError, answered: str | None, request_id: str | None) -> dict[str, Any]:
    status, body, _ = to_openai(error)
    message = {"type": "error", "id": answered, "request_id": request_id, "status": status, **body}
    return message | ({"retry_after": error.retry_after} if isinstance(error, Overloaded) else {})
