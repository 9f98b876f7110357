"""`LatencyModel`: how long a worker needs for images."""

from collections.abc import Mapping, Sequence

from service.engine.backend import BatchLimits, ModelInfo, Timing
from service.engine.batcher import BatchKey

NEWEST_WEIGHT = 0.2  # of the last batch in the running mean


class LatencyModel:
    """A running mean over finished batches for each model, size and number of steps; it starts at profiled times."""

    def __init__(self) -> None:
        self.batch_limits: dict[BatchKey, BatchLimits] = {}  # by model and size
        self._timings: dict[BatchKey, Timing] = {}  # of the largest batch, by model and size
        self._seconds: dict[BatchKey, float] = {}  # for each image of an unpadded batch

    def add(self, info: ModelInfo, timings: Mapping[BatchKey, Sequence[Timing]]) -> None:
        """Add a model with the timings of its sizes, in order of batch size."""
        for size, limits in zip(info.sizes, info.batches, strict=True):
            self.batch_limits[BatchKey(info.name, *size)] = limits
        self._timings |= {size: known[-1] for size, known in timings.items()}

    def forget(self, model: str) -> None:
        for size in [size for size in self.batch_limits if size.model == model]:  # in place: the batcher reads it
            del self.batch_limits[size]
        self._timings = {size: timing for size, timing in self._timings.items() if size.model != model}
        self._seconds = {size: seconds for size, seconds in self._seconds.items() if size.model != model}

    def learn(self, key: BatchKey, images: int, seconds: float) -> None:
        """Update the mean with a batch of so many images that took so long.

        Only with whole batches of the largest size: smaller ones take longer for each image, and a queue has few.
        """
        if self._padded(key, images) % self.batch_limits[key.size].sizes[-1]:
            return
        mean = self._per_image(key)
        self._seconds[_without_adapter(key)] = mean + NEWEST_WEIGHT * (seconds / self._padded(key, images) - mean)

    def seconds(self, images: Mapping[BatchKey, int]) -> float:
        """Return the seconds of one worker for so many images of each key, with padding."""
        return sum(self._padded(key, count) * self._per_image(key) for key, count in images.items())

    def _per_image(self, key: BatchKey) -> float:
        timing = self._timings[key.size]
        return self._seconds.get(_without_adapter(key), timing.total(key.steps) / timing.batch)

    def _padded(self, key: BatchKey, images: int) -> int:
        return self.batch_limits[key.size].padded(images)


def _without_adapter(key: BatchKey) -> BatchKey:
    """Return the key without its adapter, which does not change times."""
    return key.size._replace(steps=key.steps)
