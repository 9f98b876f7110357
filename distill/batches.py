"""What each turn of a run learns from, micro-batch by micro-batch: noise, prompts and real images by the image's index.

Every random number is a function of (seed, purpose, image index), so that a run needs no generator's state to continue,
and devices share one global batch.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from distill.config import Run
from distill.flow import Draw
from distill.methods import Batch, Real
from distill.text import TextCondition

T = TypeVar("T")


class Conditions(Protocol):
    """Encoded prompts, as the trainer reads them."""

    null: TextCondition

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> TextCondition: ...


class Reals(Protocol):
    """Encoded real images, as the trainer reads them."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> Real: ...


def micro(config: Run, local: int) -> int:
    """Images in one forward, of a process's share of a batch."""
    return min(config.micro_batch or local, local)


def batches(
    config: Run,
    images: int,
    offset: int,
    local: int,
    conditions: Conditions,
    shapes: Sequence[tuple[int, int, int]],
    pinned: bool,
    reals: Reals | None = None,
) -> Generator[Batch]:
    """The micro-batches of all turns to come, on the host: of each batch the `local` images from `offset` on."""
    for first in range(images, config.images, config.batch):
        for turn in config.method.turns():
            for step in range(turn.steps):
                purpose = f"{turn.role} {step}"
                shape = shapes[int(Draw(config.seed, f"{purpose} size", [first]).uniform() * len(shapes))]
                start, stop = first + offset, first + offset + local
                for row in range(start, stop, micro(config, local)):
                    rows = range(row, min(row + micro(config, local), stop))
                    draw = Draw(config.seed, purpose, rows)
                    z, cond = draw.normal(shape), conditions.rows(_rows(config.seed, rows, len(conditions)))
                    real = reals.rows(_rows(config.seed, rows, len(reals))) if turn.real and reals is not None else None
                    batch = Batch(z, cond, draw, real)
                    yield _pinned(batch) if pinned else batch


def ahead(items: Iterator[T]) -> Generator[T]:
    """The same items, each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _pinned(batch: Batch) -> Batch:
    """The batch where a GPU fetches it by itself."""
    real = batch.real and Real(batch.real.x_0.pin_memory(), batch.real.cond.pin_memory())
    return replace(batch, z=batch.z.pin_memory(), cond=batch.cond.pin_memory(), real=real)


def onto(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, which fetches it without being waited for."""

    def sent(x: Any) -> Any:
        return x.to(device, non_blocking=True)

    real = batch.real and Real(sent(batch.real.x_0), sent(batch.real.cond))
    return replace(batch, z=sent(batch.z), cond=sent(batch.cond), real=real)


def _rows(seed: int, images: range, count: int) -> list[int]:
    """Which prompt, or real image, each image gets.

    Every epoch is a permutation of its own, found from the image index alone.
    """
    return [int(_permutation(seed, image // count, count)[image % count]) for image in images]


@lru_cache(maxsize=4)  # of prompts and of real images; a batch may span two epochs
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)
