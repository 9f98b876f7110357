"""Middleware of every request: its id, limits on its body, log line and metrics. Plain ASGI, so nothing is buffered."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import InvalidRequest, ServiceError
from service.http.error_handlers import error_response
from service.http.origins import host_of
from service.observability.metrics import Metrics
from service.observability.request_id import new_request_id

if TYPE_CHECKING:
    from service.observability.tracing import RequestTrace, Tracing

log = logging.getLogger(__name__)
PROBE_PATHS = ("/healthz", "/readyz", "/metrics")  # polled every few seconds; logged at debug level


BODY_SECONDS = 30.0  # within which a body must arrive, unless it is an upload
_INVALID_HOST = InvalidRequest("the Host header must be one host, with a port or without", code="invalid_host")


class BodyLimit(NamedTuple):
    """Limits on the size of a body and on the time in which it arrives."""

    max_bytes: int
    seconds: float


class RequestMiddleware:
    """Outermost layer of the app, except for CORS and the proxies' headers.

    Paths are served with and without a trailing slash, also below a `root_path`. HEAD is served where GET is.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        body: BodyLimit,
        uploads: Mapping[str, BodyLimit] | None = None,
        tracing: "Tracing | None" = None,
    ) -> None:
        """`body` limits every request's body except those of the paths in `uploads`, which have their own limits."""
        self._app = app
        self._metrics = metrics
        self._body = body
        self._uploads = uploads or {}
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Process a request, or the handshake of a WebSocket."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        root = scope.get("root_path", "").rstrip("/")
        path = scope["path"].removeprefix(root).rstrip("/") or "/"
        scope = {**scope, "path": root + path}
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        one_host = not hosts or (len(hosts) == 1 and host_of(hosts[0]) is not None)
        app = self._app if one_host else error_response(_INVALID_HOST)
        if scope["type"] == "websocket":
            await self._shake_hands(app, scope, receive, send)
            return
        method = scope["method"]
        if method == "HEAD":
            scope["method"] = "GET"  # the server sends the headers alone
        request_id = scope.get("state", {}).get("request_id") or new_request_id()  # Ray's proxy gives none
        began = time.monotonic()
        status: int | None = None
        limit = self._uploads.get(path, self._body)
        too_large = HTTPException(413, f"the body is over the limit of {limit.max_bytes} bytes")
        declared = headers.get("content-length", "")
        received = 0
        complete = False  # whether the body has arrived
        is_probe = path in PROBE_PATHS
        trace = self._tracing.request(method, headers) if self._tracing and not is_probe else None

        async def receive_within_limits() -> Message:
            nonlocal received, complete
            if declared.isdecimal() and int(declared) > limit.max_bytes:
                raise too_large  # before a byte of it is read
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(began + limit.seconds - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {limit.seconds} s") from None
            if message["type"] == "http.disconnect":
                raise HTTPException(499, "the client left before its request had arrived")
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > limit.max_bytes:
                raise too_large
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await app(scope, receive_within_limits, send_with_id)
        except Exception:
            log.exception("%s failed", request_id, extra={"request_id": request_id})
            if status is not None:
                raise  # too late for another answer: the server closes the connection
            failed = ServiceError(f"the server failed; its log has the error under {request_id}")
            await error_response(failed)(scope, receive, send_with_id)
        finally:
            self._record(request_id, method, scope, status, began, trace)

    async def _shake_hands(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Open a WebSocket. A refused one is recorded like a request; in a session, each request has its own id."""
        request_id, began = new_request_id(), time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "websocket.http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                self._record(request_id, "GET", scope, message["status"], began)
            await send(message)

        await app(scope, receive, send_with_id)

    def _record(
        self,
        request_id: str,
        method: str,
        scope: Scope,
        status: int | None,
        began: float,
        trace: "RequestTrace | None" = None,
    ) -> None:
        """Count a request that has ended, log it, and end its trace."""
        route = getattr(scope.get("route"), "path", "none")
        seconds = time.monotonic() - began
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        extra = {name: scope["state"][name] for name in ("owner", "user", "prompt") if scope.get("state", {}).get(name)}
        extra |= {"request_id": request_id, "seconds": round(seconds, 4)}
        if trace:
            trace.finish(route, status, request_id)
        level = logging.DEBUG if route in PROBE_PATHS else logging.INFO
        log.log(level, "%s %s %s", method, route, status, extra=extra)


class CorsMiddleware(CORSMiddleware):
    """CORS middleware whose refusals do not repeat text of the request."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight. The requested header names are returned only if it is granted."""
        response = super().preflight_response(request_headers)
        if response.status_code != 200 and "access-control-allow-headers" in response.headers:
            del response.headers["access-control-allow-headers"]
        return response
