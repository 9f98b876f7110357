"""uvicorn's HTTP, with bounds on what a client sends outside of bodies and on how slowly it sends and takes."""

import asyncio
import logging
import secrets

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.errors import HeadTooLarge, InvalidRequest, ServiceError, TooSlow, Unavailable
from service.http.error_handlers import error_response
from service.observability.metrics import Metrics

log = logging.getLogger(__name__)
_BODY = (b"content-length", b"transfer-encoding")  # headers of a request that has a body


class Protocol(HttpToolsProtocol):
    """One connection. What is no request, or too large or slow a head of one, is refused as everything else is."""

    max_head_bytes = 64 << 10  # method, path and headers; trailers too
    head_seconds = 10.0  # from the connection, or a head's first byte, to its last
    stall_seconds = 60.0  # in which a client takes nothing of what is sent to it
    drain_body_seconds = 1.0  # time for the rest of a body once the server drains

    _begun = False  # whether a head has begun and not ended
    _head_bytes = 0  # of the head, as far as it is parsed
    _loose_bytes = 0  # received since the last piece of a body
    _deadline: asyncio.TimerHandle | None = None  # of the head
    _patience: asyncio.TimerHandle | None = None  # with a client that takes nothing
    _unsent_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a head."""
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._relax()
        if self._patience is not None:
            self._patience.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came; bytes that are part of no request are given no more time than a head."""
        self._unset_keepalive_if_required()
        self._loose_bytes += len(data)
        rest = memoryview(data)
        try:
            while rest:
                rest = self._parse(rest)
        except httptools.HttpParserError:
            self.send_400_response("")
        if self.transport.is_closing() or self.transport.get_protocol() is not self:  # a websocket's from now on
            return
        if self._loose_bytes - len(data) > self.max_head_bytes:  # before this piece, whose end is all that may be loose
            self.send_400_response("")
        elif self._begun or self.cycle is None or self.cycle.response_complete:
            self._expect()

    def on_message_begin(self) -> None:
        """A head begins."""
        self._begun, self._head_bytes = True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the path."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        self._count(name + value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete; the body has its own limits. CONNECT is refused, because this is not a proxy."""
        if self.parser.get_method() == b"CONNECT":
            raise ValueError
        if self._declined:
            return
        self._begun, self._loose_bytes = False, 0
        self._relax()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._loose_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self._declined:
            return
        self._loose_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser, or a bound, refuses."""
        if max(self._head_bytes, self._loose_bytes) > self.max_head_bytes:
            sentence = f"path and headers are over the limit of {self.max_head_bytes} bytes"
            self._refuse(HeadTooLarge(sentence), "head_too_large")
        else:
            self._refuse(InvalidRequest("this is no HTTP request", code="invalid_http"), "invalid_http")

    def shutdown(self) -> None:
        """Drain: answer complete requests, and refuse one whose body does not end soon."""
        super().shutdown()
        if self.cycle is not None and self.cycle.more_body:
            self.loop.call_later(self.drain_body_seconds, self._give_up)

    def pause_writing(self) -> None:
        """More waits to be sent than the connection's buffer holds."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """The client has taken it."""
        super().resume_writing()
        if self._patience is not None:
            self._patience.cancel()

    @property
    def _declined(self) -> bool:
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

    def _count(self, piece: bytes) -> None:
        """Raises ValueError, for the parser to stop at, when the head is too large."""
        self._head_bytes += len(piece)
        if self._head_bytes > self.max_head_bytes:
            raise ValueError

    def _expect(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.head_seconds, self._late)

    def _relax(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        if self._begun:
            sentence = f"path and headers did not arrive within {self.head_seconds:g} s"
            self._refuse(TooSlow(sentence), "head_too_slow")
        else:
            self.transport.close()

    def _give_up(self) -> None:
        if self.cycle.more_body and not self.cycle.response_started and not self.transport.is_closing():
            self._refuse(Unavailable("the server is shutting down; send the request again"), "draining")

    def _watch(self) -> None:
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._patience = self.loop.call_later(self.stall_seconds, self._check)

    def _check(self) -> None:
        if self.transport.get_write_buffer_size() < self._unsent_bytes:
            self._watch()
        else:
            log.info("a client took nothing for %g s; it is hung up on", self.stall_seconds)
            self._hung_up("answer_not_taken")
            self.transport.abort()

    def _refuse(self, error: ServiceError, reason: str) -> None:
        """Say so, and hang up."""
        response = error_response(error)
        response.headers["x-request-id"] = f"req_{secrets.token_hex(12)}"
        response.headers["connection"] = "close"
        lines = [b"%s: %s\r\n" % header for header in response.raw_headers]
        log.info("%s refused: %s", response.headers["x-request-id"], error.message)
        self._hung_up(reason)
        self.transport.write(b"".join([STATUS_LINE[response.status_code], *lines, b"\r\n", response.body]))
        self.transport.close()

    def _hung_up(self, reason: str) -> None:
        metrics: Metrics = self.app_state["metrics"]
        metrics.hung_up.labels(reason).inc()
