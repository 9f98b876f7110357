"""How long workers need for images: as timed at first, then as a running mean over the batches that were made."""

import math
from collections.abc import Mapping, Sequence

from service.engine.backend import ModelInfo, Timing
from service.engine.batcher import BatchKey

NEWEST_WEIGHT = 0.2  # weight of the last batch in the mean


class LatencyModel:
    """Seconds of one worker, by model and size. Adapters change none of them."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}  # images in each model's block, also where a batch holds fewer
        self._timings: dict[BatchKey, Timing] = {}  # of the largest batch, by model and size
        self._seconds: dict[BatchKey, float] = {}  # for one image of a whole block, by model, size and steps

    def add(self, info: ModelInfo, timings: Mapping[BatchKey, Sequence[Timing]]) -> None:
        """Take a model in, with what was timed of each of its sizes, batches growing."""
        self.rows[info.name] = info.rows
        self._timings |= {size: known[-1] for size, known in timings.items()}

    def forget(self, model: str) -> None:
        """Let go of a model."""
        del self.rows[model]
        self._timings = {size: timing for size, timing in self._timings.items() if size.model != model}
        self._seconds = {size: seconds for size, seconds in self._seconds.items() if size.model != model}

    def learn(self, key: BatchKey, images: int, seconds: float) -> None:
        """A batch of so many images took so long."""
        mean = self._per_image(key)
        self._seconds[_variant(key)] = mean + NEWEST_WEIGHT * (seconds / self._padded(key, images) - mean)

    def seconds(self, images: Mapping[BatchKey, int]) -> float:
        """What so many images of each key take, in whole blocks."""
        return sum(self._padded(key, count) * self._per_image(key) for key, count in images.items())

    def _per_image(self, key: BatchKey) -> float:
        timing = self._timings[key.size]
        return self._seconds.get(_variant(key), timing.total_of(key.steps) / timing.batch)

    def _padded(self, key: BatchKey, images: int) -> int:
        rows = self.rows[key.model]
        return math.ceil(images / rows) * rows


def _variant(key: BatchKey) -> BatchKey:
    """The key without its adapter, which changes no times."""
    return key.size._replace(steps=key.steps)
