"""What `/metrics` shows: seconds, bytes and counts, in a registry of the app's own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Every instrument, by name."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "requests_total", "Requests answered", ["route", "status"], registry=self.registry
        )
        self.images = Counter("images_total", "Images made", ["model"], registry=self.registry)
        self.refusals = Counter(
            "refusals_total", "Requests refused at the door", ["reason"], registry=self.registry
        )
        self.dropped = Counter(
            "dropped_images_total", "Queued images whose client left", registry=self.registry
        )
        self.failures = Counter(
            "failed_batches_total", "Batches that raised", ["model"], registry=self.registry
        )
        self.queue = Gauge("queued_images", "Images waiting for a device", registry=self.registry)
        self.batch_size = Histogram(
            "batch_images",
            "Images per call of the network",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.stages = Histogram(
            "stage_seconds", "Time of each stage", ["stage"], buckets=_SECONDS, registry=self.registry
        )
        self.bytes = Counter(
            "encoded_bytes_total", "Bytes of encoded images", ["format"], registry=self.registry
        )
