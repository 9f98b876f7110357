"""The Prometheus metrics of `/metrics`, in a registry of each app."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """All metrics. Their names begin with `fgm_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="fgm", registry=self.registry)
        gauge = partial(Gauge, namespace="fgm", registry=self.registry)
        histogram = partial(Histogram, namespace="fgm", registry=self.registry)

        self.requests = counter("requests_total", "Requests that were answered", ["route", "status"])
        self.request_seconds = histogram("request_seconds", "Seconds in the server", ["route"], buckets=_SECONDS)
        self.refusals = counter("refusals_total", "Requests that were refused before they were queued", ["reason"])
        self.closed_connections = counter("closed_connections_total", "Connections that the server closed", ["reason"])
        self.queue = gauge("queued_images", "Images that wait for a worker")
        self.dropped = counter("dropped_images_total", "Queued images whose client disconnected")
        self.sessions = gauge("realtime_sessions", "Realtime sessions that are open")
        self.batch_size = histogram("batch_images", "Images of a batch", buckets=_IMAGES)
        self.closed = counter("closed_batches_total", "Batches that were sent to a worker, by reason", ["reason"])
        self.workers = gauge("workers", "Workers that are ready")
        self.restarts = counter("worker_restarts_total", "Workers that were replaced", ["reason"])
        self.device_memory = gauge("device_memory_bytes", "Bytes of device memory that a worker holds", ["device"])
        self.cache_hits = counter("cache_hits_total", "Images and prompts that were found in a cache", ["cache"])
        self.failures = counter("failed_batches_total", "Batches that failed", ["model"])
        self.images = counter("images_total", "Images that were generated", ["model"])
        self.stages = histogram("stage_seconds", "Seconds of each stage of a request", ["stage"], buckets=_SECONDS)
        self.blocked = counter("blocked_images_total", "Images that the safety check blocked", ["model"])
        self.bytes = counter("encoded_bytes_total", "Bytes of encoded images", ["format"])
