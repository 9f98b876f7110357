"""What each turn of a run learns from, micro-batch by micro-batch: images by index, their prompts and real images.

All of it is a function of (seed, purpose, image index), so that a run needs no generator's state to continue, and
devices share one global batch.
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


class Conditions(Protocol):
    """Encoded prompts, as the trainer reads them."""

    null: TextCondition

    def __len__(self) -> int: ...

    def rows(self, indices: Tensor) -> TextCondition: ...


class Reals(Protocol):
    """Encoded real images, as the trainer reads them."""

    def __len__(self) -> int: ...

    def rows(self, indices: Tensor) -> Real: ...


@dataclass(frozen=True)
class MicroBatch:
    """The images of one forward by their indices (B,), with conditions of their prompts, and real images if asked for.

    `shape` (C, h, w) is that of their latents, and `purpose` names the random numbers that are drawn for them.
    """

    purpose: str
    shape: tuple[int, int, int]
    images: Tensor
    cond: TextCondition
    real: Real | None

    def batch(self, seed: int) -> TrainingBatch:
        """The batch that a loss takes, its noise drawn where the indices are."""
        draw = Draw(seed, self.purpose, self.images)
        return TrainingBatch(draw.normal(self.shape), self.cond, draw, self.real)

    def tensors(self) -> list[Tensor]:
        """Everything that changes from one micro-batch of a purpose to the next."""
        real = [self.real.x_0, self.real.cond.embeds, self.real.cond.pooled] if self.real else []
        return [self.images, self.cond.embeds, self.cond.pooled, *real]

    def with_tensors(self, images: Tensor, embeds: Tensor, pooled: Tensor, *real: Tensor) -> Self:
        """The same of other values, in the order of `tensors`."""
        others = Real(real[0], TextCondition(real[1], real[2])) if real else None
        return type(self)(self.purpose, self.shape, images, TextCondition(embeds, pooled), others)

    def pin_memory(self) -> Self:
        """The same where a GPU fetches it by itself; what is on a GPU stays there."""
        pinned = (x if x.is_cuda else x.pin_memory() for x in self.tensors())
        return self.with_tensors(*pinned)

    def to(self, device: torch.device) -> Self:
        """The same on a device, which fetches it without being waited for."""
        return self.with_tensors(*(x.to(device, non_blocking=True) for x in self.tensors()))


def micro(config: RunConfig, local: int) -> int:
    """Images in one forward, of a process's share of a batch."""
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
    """The micro-batches of all turns to come: of each batch the `local` images from `offset` on."""
    for first in range(images, config.images, config.batch):
        for turn in config.method.turns():
            for step in range(turn.steps):
                purpose = f"{turn.role} {step}"
                shape = shapes[int(Draw(config.seed, f"{purpose} size", [first]).integers(len(shapes)))]
                start, stop = first + offset, first + offset + local
                for row in range(start, stop, micro(config, local)):
                    rows = range(row, min(row + micro(config, local), stop))
                    cond = conditions.rows(_rows(config.seed, "prompts", rows, len(conditions)))
                    real = None
                    if turn.real and reals is not None:
                        real = reals.rows(_rows(config.seed, "real images", rows, len(reals)))
                    made = MicroBatch(purpose, shape, torch.arange(rows.start, rows.stop), cond, real)
                    yield made.pin_memory() if pinned else made


def ahead(items: Iterator[T]) -> Generator[T]:
    """The same items, each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _rows(seed: int, purpose: str, images: range, count: int) -> Tensor:
    """Which prompt, or real image, each image gets, as indices (B,).

    Every epoch is a permutation of its own, found from the image index alone.
    """
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
