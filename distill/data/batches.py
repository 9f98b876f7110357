"""Micro-batches of a run: images by index, conditions of their prompts, and real images.

All is a function of (seed, purpose, image index), so a run resumes without generator state, and devices share one
global batch.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from distill.config import RunConfig
from distill.methods.base import Real, TrainingBatch
from distill.models.text import TextCondition
from distill.philox import Draw, key_of

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Rows(Protocol[T_co]):
    """Encoded prompts or real images, as the trainer reads them."""

    def __len__(self) -> int: ...

    def rows(self, indices: Tensor) -> T_co: ...


class Conditions(Rows[TextCondition], Protocol):
    """Encoded prompts, with the empty one."""

    null: TextCondition


Reals = Rows[Real]


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
        """Copy to a device without waiting."""
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
    """Yield the micro-batches of all turns to come; a process has the `local` images from `offset` of each batch."""
    for first in range(images, config.images, config.batch):
        for turn in config.method.turns():
            for step in range(turn.steps):
                purpose = f"{turn.role} {step}"
                shape = shapes[int(Draw(config.seed, f"{purpose} size", [first]).integers(len(shapes)))]
                start, stop = first + offset, first + offset + local
                for row in range(start, stop, micro_batch_size(config, local)):
                    rows = range(row, min(row + micro_batch_size(config, local), stop))
                    cond = conditions.rows(_rows(config.seed, "prompts", rows, len(conditions)))
                    real = None
                    if turn.real and reals is not None:
                        real = reals.rows(_rows(config.seed, "real images", rows, len(reals)))
                    part = MicroBatch(purpose, shape, torch.arange(rows.start, rows.stop), cond, real)
                    yield part.pin_memory() if pinned else part


def prefetch(items: Iterator[T]) -> Generator[T]:
    """Yield the items, making each in a thread while the caller uses the one before."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def _rows(seed: int, purpose: str, images: range, count: int) -> Tensor:
    """Indices (B,) of the prompts, or real images, of some images. Each epoch is another permutation."""
    parts = []
    start = images.start
    while start < images.stop:
        epoch, row = divmod(start, count)
        parts.append(_permutation(seed, purpose, epoch, count)[row : row + images.stop - start])
        start += len(parts[-1])
    return torch.cat(parts)


@lru_cache(maxsize=4)  # of prompts and of real images; a batch may span two epochs
def _permutation(seed: int, purpose: str, epoch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(key_of(seed, f"{purpose} {epoch}"))
    return torch.randperm(count, generator=generator)
