"""Micro-batches of a run: images by index, conditions of their prompts, and real images.

All is a function of (seed, purpose, image index), so a run resumes without generator state, and devices share one
global batch.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from distill.config import RunConfig
from distill.data.conditions import Conditions, Reals, Rows
from distill.methods.base import Real, TrainingBatch
from distill.models.text import TextCondition
from distill.philox import Draw, key_of

AHEAD = 4  # micro-batches that are prepared while a step is computed
T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass: image indices (B,), conditions of their prompts, and real images if needed.

    `shape` (C, h, w) is the shape of the latents. `purpose` names the stream of random numbers.
    """

    purpose: str
    shape: tuple[int, int, int]
    images: Tensor
    cond: TextCondition
    real: Real | None

    def batch(self, seed: int) -> TrainingBatch:
        """Make the input of a loss; noise is generated on the device of the indices."""
        draw = Draw(seed, self.purpose, self.images)
        return TrainingBatch(draw.normal(self.shape), self.cond, draw, self.real)

    def tensors(self) -> list[Tensor]:
        """List the tensors, which are all that differs between micro-batches of one purpose."""
        real = [self.real.x_0, self.real.cond.embeds, self.real.cond.pooled] if self.real else []
        return [self.images, self.cond.embeds, self.cond.pooled, *real]

    def with_tensors(self, images: Tensor, embeds: Tensor, pooled: Tensor, *real: Tensor) -> Self:
        """Replace the tensors, in the order of `tensors`."""
        others = Real(real[0], TextCondition(real[1], real[2])) if real else None
        return type(self)(self.purpose, self.shape, images, TextCondition(embeds, pooled), others)

    def pin_memory(self) -> Self:
        """Copy to pinned memory; tensors on a GPU stay there."""
        pinned = (x if x.is_cuda else x.pin_memory() for x in self.tensors())
        return self.with_tensors(*pinned)

    def to(self, device: torch.device) -> Self:
        """Copy to a device without waiting. Memory of another CUDA stream is kept until this stream has used it."""
        for x in self.tensors():
            if x.is_cuda:
                x.record_stream(torch.cuda.current_stream(x.device))
        return self.with_tensors(*(x.to(device, non_blocking=True) for x in self.tensors()))


def micro_batch_size(config: RunConfig, local: int) -> int:
    """Images in one forward pass of a process that has `local` images of a batch."""
    return min(config.micro_batch or local, local)


def batches(
    config: RunConfig,
    images: int,
    offset: int,
    local: int,
    conditions: Conditions,
    shapes: Sequence[tuple[int, int, int]],
    pinned: bool,
    reals: Reals | None = None,
) -> Generator[MicroBatch]:
    """Yield the micro-batches of the coming rounds; a process has the `local` images from `offset` of each batch."""
    prompts = _Shuffled(conditions, config.seed, "prompts")
    examples = None if reals is None else _Shuffled(reals, config.seed, "real images")
    for first in range(images, config.images, config.batch):
        for phase in config.method.update_phases():
            for step in range(phase.steps):
                purpose = f"{phase.role} {step}"
                shape = shapes[int(Draw(config.seed, f"{purpose} size", [first]).integers(len(shapes)))]
                start, stop = first + offset, first + offset + local
                for row in range(start, stop, micro_batch_size(config, local)):
                    rows = range(row, min(row + micro_batch_size(config, local), stop))
                    cond = prompts.rows(rows)
                    real = examples.rows(rows) if phase.real and examples is not None else None
                    part = MicroBatch(purpose, shape, torch.arange(rows.start, rows.stop), cond, real)
                    yield part.pin_memory() if pinned else part


def prefetch(items: Iterator[T]) -> Generator[T]:
    """Yield the items, making the next AHEAD in a thread meanwhile. The thread ends with the generator."""
    with ThreadPoolExecutor(1) as thread:
        make = partial(thread.submit, next, items, None)
        upcoming = deque(make() for _ in range(AHEAD))
        try:
            while (item := upcoming.popleft().result()) is not None:
                upcoming.append(make())
                yield item
        finally:
            thread.shutdown(cancel_futures=True)


class _Shuffled(Generic[T]):
    """The rows of images by index. Each epoch is another permutation, a function of the seed and the purpose."""

    def __init__(self, source: Rows[T], seed: int, purpose: str) -> None:
        self._source = source
        self._seed = seed
        self._purpose = purpose
        self._order = lru_cache(maxsize=2)(self._shuffle)  # a batch may span two epochs

    def rows(self, images: range) -> T:
        parts = []
        start = images.start
        while start < images.stop:
            epoch, row = divmod(start, len(self._source))
            parts.append(self._order(epoch)[row : row + images.stop - start])
            start += len(parts[-1])
        return self._source.rows(torch.cat(parts))

    def _shuffle(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(key_of(self._seed, f"{self._purpose} {epoch}"))
        return self._source.shuffle(generator)
