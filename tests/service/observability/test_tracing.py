"""Traces of requests and batches, their links, and no tracing without a collector."""

import contextlib
import http.server
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from running import serving
from websockets.sync.client import connect
from worker_threads import worker_threads

from service.app import create_app
from service.engine.simulator import Simulator
from service.errors import StartError
from service.observability.tracing import Tracing
from service.settings import Settings

STAGES = ["queue", "text", "model", "vae"]


class Anything:
    """A check that blocks nothing."""

    def __call__(self, pixels, moderation):
        return None


class Spans:
    """The spans of a server. They are complete after it is drained."""

    def __init__(self):
        self.exporter = InMemorySpanExporter()

    def all(self):
        return self.exporter.get_finished_spans()

    def named(self, name):
        return [span for span in self.all() if span.name == name]

    def below(self, parent):
        """Return the child spans, the earliest first."""
        children = [span for span in self.all() if span.parent and span.parent.span_id == parent.context.span_id]
        return sorted(children, key=lambda span: span.start_time)


@contextlib.contextmanager
def traced(spans, backend=None, **settings):
    app = create_app(Settings(**settings), worker_threads(backend or Simulator(0.001, 0)), Tracing(spans.exporter))
    with serving(app) as url:
        yield f"{url}/v1/images/generations"


def names(spans):
    return [span.name for span in spans]


def linked(span):
    return {link.context.span_id for link in span.links}


def test_a_request_is_a_server_span_with_child_spans_for_stages():
    spans = Spans()
    with traced(spans, images={"safety": f"{__name__}:Anything"}) as url:
        answer = httpx.post(url, json={"prompt": "a secret owl", "n": 2, "size": "128x64"})
        httpx.get(url.replace("/v1/images/generations", "/healthz"))
    (request,) = [span for span in spans.all() if span.kind == SpanKind.SERVER]
    assert request.name == "POST /v1/images/generations"
    assert request.parent is None
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/images/generations",
        "http.response.status_code": 200,
        "gen_ai.request.model": "simulator",
        "fgm.size": "128x64",
        "fgm.images": 2,
        "fgm.request_id": answer.headers["x-request-id"],
    }
    stages = spans.below(request)
    assert names(stages) == [*STAGES, "safety", "encode"]
    assert request.start_time <= stages[0].start_time
    assert all(before.end_time <= after.start_time for before, after in pairwise(stages))
    assert stages[-1].end_time <= request.end_time
    assert all("owl" not in span.to_json() for span in spans.all())


def test_requests_that_share_a_batch_are_linked_to_it():
    spans = Spans()
    with traced(spans, engine={"max_batch": 2, "batching_window_seconds": 30}) as url, ThreadPoolExecutor() as clients:
        list(clients.map(lambda seed: httpx.post(url, json={"prompt": "x", "seed": seed}), range(2)))
    (batch,) = spans.named("batch")
    requests = spans.named("POST /v1/images/generations")
    assert len({span.context.trace_id for span in (batch, *requests)}) == 3
    assert linked(batch) == {request.context.span_id for request in requests}
    assert batch.attributes["fgm.images"] == 2
    assert batch.attributes["fgm.closed_by"] == "full"
    shared = spans.below(batch)
    assert names(shared) == STAGES[1:]
    for request in requests:
        queue, *rest, _ = spans.below(request)
        assert queue.name == "queue"
        assert names(rest) == STAGES[1:]
        assert all(linked(stage) == {batch.context.span_id} for stage in (queue, *rest))


def test_a_cached_image_has_only_the_encoding_stage():
    spans = Spans()
    with traced(spans) as url:
        for _ in range(2):
            httpx.post(url, json={"prompt": "x", "seed": 1})
    first, second = spans.named("POST /v1/images/generations")
    assert names(spans.below(first)) == [*STAGES, "encode"]
    assert names(spans.below(second)) == ["encode"]


@pytest.mark.parametrize(("flags", "recorded"), [("01", True), ("00", False)])
def test_a_request_continues_its_clients_trace(flags, recorded):
    spans = Spans()
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with traced(spans) as url:
        httpx.post(url, json={"prompt": "x"}, headers={"traceparent": f"00-{trace_id}-{parent}-{flags}"})
    mine = [span for span in spans.all() if f"{span.context.trace_id:032x}" == trace_id]
    assert bool(mine) == recorded
    assert all(f"{span.parent.span_id:016x}" == parent for span in mine if span.kind == SpanKind.SERVER)


def test_a_failed_batch_and_its_request_have_the_error_status():
    spans = Spans()
    with traced(spans, Simulator(0, 0, fails_on="bad")) as url:
        httpx.post(url, json={"prompt": "bad"})
        httpx.post(url, json={"prompt": "x", "size": "1x1"})
    (batch,) = spans.named("batch")
    failed, refused = spans.named("POST /v1/images/generations")
    assert batch.attributes["error.type"] == "error"
    assert batch.status.status_code == failed.status.status_code == StatusCode.ERROR
    assert linked(batch) == {failed.context.span_id}
    assert refused.attributes["http.response.status_code"] == 400
    assert refused.status.status_code == StatusCode.UNSET


def test_each_request_of_a_realtime_session_is_a_trace():
    spans = Spans()
    with traced(spans) as url, connect(f"ws{url.removeprefix('http').rsplit('/', 2)[0]}/realtime/images") as session:
        for seed in range(2):
            session.send(json.dumps({"type": "images.generate", "id": str(seed), "prompt": "x", "seed": seed}))
            assert json.loads(session.recv())["type"] == "images.completed"
    requests = spans.named("GET /v1/realtime/images")
    assert len({request.context.trace_id for request in requests}) == 2
    assert all(names(spans.below(request)) == [*STAGES, "encode"] for request in requests)


def test_spans_reach_a_collector_before_the_server_ends(monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    received = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        settings = Settings(observability={"otlp_endpoint": f"http://127.0.0.1:{collector.server_port}"})
        with serving(create_app(settings, worker_threads(Simulator(0, 0)))) as url:
            httpx.post(f"{url}/v1/images/generations", json={"prompt": "x"})
        collector.shutdown()
        thread.join()
    assert {path for path, _ in received} == {"/v1/traces"}
    resources = [each for _, request in received for each in request.resource_spans]
    services = {a.value.string_value for each in resources for a in each.resource.attributes if a.key == "service.name"}
    assert services == {"pictures"}
    sent = {span.name for each in resources for scope in each.scope_spans for span in scope.spans}
    assert sent == {"POST /v1/images/generations", "batch", "encode", *STAGES}


def test_without_a_collector_the_sdk_is_not_imported():
    code = """
import sys
from starlette.testclient import TestClient
from service.app import create_app
from service.settings import Settings

with TestClient(create_app(Settings(engine={"devices": "simulator"})), "http://localhost") as client:
    assert client.post("/v1/images/generations", json={"prompt": "x"}).status_code == 200
sys.exit("service.observability.tracing" in sys.modules or "opentelemetry.sdk" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_collector_without_the_sdk_is_refused_at_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "service.observability.tracing", None)  # as where the extra is not installed
    with pytest.raises(StartError, match=r"otlp_endpoint: .*\[tracing\]"):
        create_app(Settings(observability={"otlp_endpoint": "http://localhost:4318"}))
