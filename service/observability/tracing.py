"""OpenTelemetry spans of requests and batches. Needs the SDK: imported only if the settings name a collector.

A request is a trace, or part of its client's trace: a server span with a child span for each stage. A batch serves
several requests, so it is a separate trace that links to theirs, and their stages link to it. Spans hold names and
numbers, never a prompt. Times are seconds of the monotonic clock, which the server shares with its workers.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Link, SpanKind, StatusCode, Tracer, set_span_in_context

from service.engine.batcher import ImageBatch
from service.engine.messages import BatchDone, BatchFailed

NAME = "fgm-service"
CLOSE_SECONDS = 3.0  # to send the last spans at shutdown
Attributes = Mapping[str, str | int]


class Trace:
    """A span, and child spans for its stages."""

    def __init__(
        self,
        tracer: Tracer,
        name: str,
        began: float,
        parent: Context,
        attributes: Attributes,
        kind: SpanKind = SpanKind.INTERNAL,
        links: Sequence[Link] = (),
    ) -> None:
        self._tracer = tracer
        self._began = began
        self._epoch = time.time_ns() - int(1e9 * time.monotonic())  # read once, so that no two spans disagree
        self._span = tracer.start_span(name, parent, kind, dict(attributes), links, self._wall(began))
        self._below = set_span_in_context(self._span, parent)

    @property
    def link(self) -> Link:
        return Link(self._span.get_span_context())

    def set_attributes(self, attributes: Attributes) -> None:
        self._span.set_attributes(dict(attributes))

    def stage(self, name: str, began: float, ended: float, links: Sequence[Link] = ()) -> None:
        """Record a stage that has ended. If it began before this span, the earlier part is left out."""
        if ended > self._began:
            start = self._wall(max(began, self._began))
            self._tracer.start_span(name, self._below, links=links, start_time=start).end(self._wall(ended))

    def end(self, ended: float, failed: bool) -> None:
        if failed:
            self._span.set_status(StatusCode.ERROR)
        self._span.end(self._wall(ended))

    def _wall(self, seconds: float) -> int:
        return self._epoch + int(1e9 * seconds)


class RequestTrace(Trace):
    """The server span of one request."""

    def __init__(self, tracer: Tracer, method: str, headers: Mapping[str, str]) -> None:
        attributes = {"http.request.method": method}
        super().__init__(tracer, method, time.monotonic(), extract(headers), attributes, SpanKind.SERVER)
        self._method = method

    def finish(self, route: str, status: int | None, request_id: str) -> None:
        """End the span. `status` is None if the connection was closed before there was one."""
        self._span.update_name(f"{self._method} {route}")
        self.set_attributes({"http.route": route, "fgm.request_id": request_id})
        if status is not None:
            self.set_attributes({"http.response.status_code": status})
        self.end(time.monotonic(), failed=status is None or status >= 500)


_current: ContextVar[RequestTrace | None] = ContextVar("request_trace", default=None)


class Tracing:
    """Creates spans and sends them to an exporter."""

    def __init__(self, exporter: SpanExporter) -> None:
        """Send spans in a separate thread; OTEL_* variables configure it."""
        self._exporter = exporter
        resource = Resource.create({SERVICE_NAME: NAME}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(NAME)

    @classmethod
    def to(cls, endpoint: str) -> "Tracing":
        """Return tracing to the OTLP collector of a base URL."""
        return cls(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces"))

    @property
    def current(self) -> RequestTrace | None:
        """The request of this task; None in jobs."""
        return _current.get()

    def request(self, method: str, headers: Mapping[str, str]) -> RequestTrace:
        """Start a request's span, as a child of the one in its headers, and make it this task's `current`."""
        trace = RequestTrace(self._tracer, method, headers)
        _current.set(trace)
        return trace

    def batch(
        self, batch: ImageBatch, device: str, sent: float, answered: float, reply: BatchDone | BatchFailed
    ) -> None:
        """Record a batch that a worker has answered, and its stages in each of its requests."""
        arrived: dict[RequestTrace, float] = {}  # the first of each one's images
        for work in batch.images:
            for request in work.traces:
                arrived[request] = min(work.arrived, arrived.get(request, work.arrived))
        attributes: Attributes = {
            "gen_ai.request.model": batch.key.model,
            "fgm.size": f"{batch.key.width}x{batch.key.height}",
            "fgm.images": len(batch.images),
            "fgm.closed_by": batch.reason,
            "fgm.device": device,
        }
        links = [request.link for request in arrived]
        whole = Trace(self._tracer, "batch", sent, Context(), attributes, links=links)
        if isinstance(reply, BatchDone):
            for request, since in arrived.items():
                request.stage("queue", since, sent, [whole.link])
            for stage, seconds in reply.seconds.items():
                began = reply.began[stage]
                whole.stage(stage, began, began + seconds)
                for request in arrived:
                    request.stage(stage, began, began + seconds, [whole.link])
        else:
            whole.set_attributes({"error.type": reply.fault})
        whole.end(answered, failed=isinstance(reply, BatchFailed))

    def close(self) -> None:
        """Send the last spans, unless the collector does not answer. Blocks."""
        timer = threading.Timer(CLOSE_SECONDS, self._exporter.shutdown)  # ends its retries; the SDK would wait 30 s
        timer.start()
        self._provider.shutdown()
        timer.cancel()
