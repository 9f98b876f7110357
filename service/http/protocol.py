"""uvicorn's HTTP protocol with limits on the size of heads and on slow clients."""

import asyncio
import logging

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.errors import HeadTooLarge, InvalidRequest, ServiceError, TooSlow, Unavailable
from service.http.error_handlers import error_response
from service.observability.metrics import Metrics
from service.observability.request_id import new_request_id

log = logging.getLogger(__name__)
_BODY = (b"content-length", b"transfer-encoding")  # headers of a request that has a body


class HttpProtocol(HttpToolsProtocol):
    """One connection. Invalid requests and heads that are too large or slow get the same errors as other requests."""

    max_head_bytes = 64 << 10  # method, path and headers; trailers too
    head_seconds = 10.0  # from the connection, or a head's first byte, to its last byte
    stall_seconds = 60.0  # without progress before a connection with unread data is closed
    drain_body_seconds = 1.0  # time for the rest of a body once the server drains

    _head_begun = False  # whether a head has begun and not ended
    _head_bytes = 0  # of the head, as far as it is parsed
    _unframed_bytes = 0  # received since the last body chunk
    _head_timer: asyncio.TimerHandle | None = None  # for the rest of the head
    _stall_timer: asyncio.TimerHandle | None = None  # for a client that reads nothing
    _unsent_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the data. Bytes outside any request get no more time than a head."""
        self._unset_keepalive_if_required()
        self._unframed_bytes += len(data)
        rest = memoryview(data)
        try:
            while rest:
                rest = self._parse(rest)
        except httptools.HttpParserError:
            self.send_400_response("")
        if self.transport.is_closing() or self.transport.get_protocol() is not self:  # a websocket's from now on
            return
        # Without this chunk, of which only the end may be unframed.
        if self._unframed_bytes - len(data) > self.max_head_bytes:
            self.send_400_response("")
        elif self._head_begun or self.cycle is None or self.cycle.response_complete:
            self._start_head_timer()

    def on_message_begin(self) -> None:
        self._head_begun, self._head_bytes = True, 0
        super().on_message_begin()
        self.scope["state"]["request_id"] = new_request_id()  # the middleware's too, should the body be refused here

    def on_url(self, url: bytes) -> None:
        self._count_head(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(name + value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Handle the end of a head. CONNECT is refused, because this is not a proxy."""
        if self.parser.get_method() == b"CONNECT":
            raise ValueError
        if self._upgrade_ignored:
            return
        self._head_begun, self._unframed_bytes = False, 0
        self._stop_head_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unframed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrade_ignored:
            return
        self._unframed_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that is invalid, or whose head is too large."""
        if max(self._head_bytes, self._unframed_bytes) > self.max_head_bytes:
            sentence = f"path and headers are over the limit of {self.max_head_bytes} bytes"
            self._refuse(HeadTooLarge(sentence), "head_too_large")
        else:
            self._refuse(InvalidRequest("this is not an HTTP request", code="invalid_http"), "invalid_http")

    def shutdown(self) -> None:
        """Drain: answer complete requests, and refuse one whose body does not end soon."""
        super().shutdown()
        if self.cycle is not None and self.cycle.more_body:
            self.loop.call_later(self.drain_body_seconds, self._refuse_body)

    def pause_writing(self) -> None:
        """Start watching a client whose send buffer is full."""
        super().pause_writing()
        self._start_stall_timer()

    def resume_writing(self) -> None:
        """Stop watching: the client has read enough."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    @property
    def _upgrade_ignored(self) -> bool:
        """Whether the current head offers an upgrade that is ignored (RFC 9110, 7.8)."""
        return bool(self.parser.should_upgrade()) and not self._should_upgrade()

    def _should_upgrade(self) -> bool:
        """Whether the offered upgrade is a WebSocket; its request is a GET without a body."""
        body = any(name in _BODY and value != b"0" for name, value in self.headers)
        return self.parser.get_method() == b"GET" and not body and super()._should_upgrade()

    def _parse(self, data: memoryview) -> memoryview:
        """Parse to the end, or to the end of a head that offers an ignored upgrade. Returns the rest."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
                return data[:0]
            # This parser has skipped the body. A new one reads the head again, without the offer, and then the body.
            head = self._head_without_offer()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self.parser.feed_data(head)
            return data[offer.args[0] :]
        return data[:0]

    def _head_without_offer(self) -> bytes:
        start = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        lines = [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        return b"".join([start, *lines, b"\r\n"])

    def _count_head(self, chunk: bytes) -> None:
        """Raises ValueError, for the parser to stop at, when the head is too large."""
        self._head_bytes += len(chunk)
        if self._head_bytes > self.max_head_bytes:
            raise ValueError

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._head_timed_out)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_timed_out(self) -> None:
        if self._head_begun:
            sentence = f"path and headers did not arrive within {self.head_seconds:g} s"
            self._refuse(TooSlow(sentence), "head_too_slow")
        else:
            self.transport.close()

    def _refuse_body(self) -> None:
        if self.cycle.more_body and not self.cycle.response_started and not self.transport.is_closing():
            self._refuse(Unavailable("the server is shutting down; send the request again"), "draining")

    def _start_stall_timer(self) -> None:
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(self.stall_seconds, self._check_stall)

    def _check_stall(self) -> None:
        if self.transport.get_write_buffer_size() < self._unsent_bytes:
            self._start_stall_timer()
        else:
            log.info("a client read nothing for %g s; its connection is closed", self.stall_seconds)
            self._count_closed("answer_not_taken")
            self.transport.abort()

    def _refuse(self, error: ServiceError, reason: str) -> None:
        response = error_response(error)
        unfinished = self._head_begun or (self.cycle is not None and not self.cycle.response_complete)
        request_id = self.scope["state"]["request_id"] if unfinished else new_request_id()
        response.headers["x-request-id"] = request_id
        response.headers["connection"] = "close"
        lines = [b"%s: %s\r\n" % header for header in response.raw_headers]
        log.info("%s refused: %s", request_id, error.message, extra={"request_id": request_id})
        self._count_closed(reason)
        self.transport.write(b"".join([STATUS_LINE[response.status_code], *lines, b"\r\n", response.body]))
        self.transport.close()

    def _count_closed(self, reason: str) -> None:
        metrics: Metrics = self.app_state["metrics"]
        metrics.closed_connections.labels(reason).inc()
