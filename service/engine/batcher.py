"""The batching policy: which queued images a worker gets next. No torch, no asyncio, no clock of its own.

All images of a batch have one model, size, number of steps, and adapter at one scale, as the network requires.
Interactive images go before bulk images. Owners (API keys) take turns, and an owner's oldest image leads a batch; the
rest of the batch is filled with images of the same key, one of each owner in turn.

Models pad a batch to one of the sizes in `batch_limits[size]`, so a busy worker is only given batches that need no
padding. The other images wait until the worker is idle. Then they are sent at once, or after the batching window.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from service.engine.backend import BatchLimits


class BatchKey(NamedTuple):
    """What all images of a batch have in common."""

    model: str
    width: int
    height: int
    adapter: str | None = None
    scale: float = 0.0  # of the adapter
    steps: int = 1  # network evaluations per image

    @property
    def size(self) -> "BatchKey":
        """The model and size alone, which determine a batch's memory."""
        return BatchKey(self.model, self.width, self.height)


class Priority(IntEnum):
    """The lower value goes first."""

    INTERACTIVE = 0
    BULK = 1


@dataclass(eq=False)
class QueuedImage:
    """One image to generate. It carries its reply and its times."""

    key: BatchKey
    prompt: str
    seed: int
    reply: Any  # the engine's future; the batcher only calls `cancelled()`
    owner: str = ""
    priority: Priority = Priority.INTERACTIVE  # decides which requests count it against the limits
    cache_key: Any = None  # the engine's key of the result
    arrived: float = field(default=0.0)  # seconds, on the caller's clock
    waiters: int = 0  # requests that wait for it
    begun: bool = False  # whether a worker received it
    traces: tuple[Any, ...] = ()  # of the requests that wait for it; used by the engine
    deaths: int = 0  # workers that died while it was alone in their oldest batch


@dataclass(eq=False)
class ImageBatch:
    """Images for one run of the network. `reason` is why it was closed: full, unpadded, drained or retry."""

    key: BatchKey
    images: list[QueuedImage]
    reason: str

    def halves(self) -> Iterator["ImageBatch"]:
        """Split the batch in two, to isolate an image that fails."""
        middle = len(self.images) // 2
        for part in (self.images[:middle], self.images[middle:]):
            yield ImageBatch(self.key, part, "retry")


_Line = tuple[Priority, str, BatchKey]  # the owner is in the middle


class Batcher:
    """The queue: bounded in total and for each owner."""

    def __init__(
        self,
        max_batch: int,
        limit: int,
        owner_limit: int,
        batch_limits: Mapping[BatchKey, BatchLimits],
        window_seconds: float = 0.0,
    ) -> None:
        """`batch_limits`, by model and size, is read at every batch.

        `window_seconds` is how long an idle worker waits for a full batch. Both limits are in images.
        """
        self._max_batch = max_batch
        self._limit = limit
        self._owner_limit = owner_limit
        self._batch_limits = batch_limits
        self._window_seconds = window_seconds
        self._caps: dict[BatchKey, int] = {}
        self._lines: dict[_Line, deque[QueuedImage]] = {}
        self._turns: dict[str, None] = {}  # owners with queued images, the next to lead first
        self._retries: deque[ImageBatch] = deque()

    def __len__(self) -> int:
        """Return the queued images, including retries."""
        return sum(map(len, self._lines.values())) + sum(len(batch.images) for batch in self._retries)

    def missing_room(self, images: int, owner: str, priority: Priority) -> int:
        """Return how many images must leave before so many more of an owner fit. Lower priorities do not count."""
        queued = sum(_count(line, priority) for line in self._lines.values())
        queued += sum(_count(batch.images, priority) for batch in self._retries)
        return max(queued + images - self._limit, self.missing_own_room(images, owner, priority))

    def missing_own_room(self, images: int, owner: str, priority: Priority) -> int:
        """Return the same for the owner's limit alone, whatever others have queued."""
        own = sum(_count(line, priority) for (_, name, _), line in self._lines.items() if name == owner)
        return max(0, own + images - self._owner_limit)

    def ahead_of(self, priority: Priority) -> dict[BatchKey, int]:
        """Count the queued images of this priority or a better one, by key."""
        counts: dict[BatchKey, int] = {}
        for (level, _, key), line in self._lines.items():
            if level <= priority:
                counts[key] = counts.get(key, 0) + len(line)
        for batch in self._retries:
            counts[batch.key] = counts.get(batch.key, 0) + len(batch.images)
        return counts

    def cap(self, key: BatchKey) -> int:
        """Return the largest number of images in a batch."""
        return self._caps.get(key.size, self._max_batch)

    def lower_cap(self, key: BatchKey, cap: int) -> None:
        """Make the batches of a size no larger than this, but at least one image."""
        self._caps[key.size] = max(1, min(cap, self.cap(key)))

    def forget(self, model: str) -> None:
        """Drop the caps of a model without queued images."""
        self._caps = {key: cap for key, cap in self._caps.items() if key.model != model}

    def add(self, image: QueuedImage, now: float) -> None:
        image.arrived = now
        self._turns.setdefault(image.owner)
        self._lines.setdefault((image.priority, image.owner, image.key), deque()).append(image)

    def retry(self, batch: ImageBatch) -> None:
        """Run a batch again, without cancelled images, before everything else and with no images added."""
        batch.images = [image for image in batch.images if not image.reply.cancelled()]
        if batch.images:
            self._retries.append(batch)

    def promote(self, model: str, adapter: str | None) -> None:
        """Give the bulk images of a model or adapter interactive priority, because somebody waits for the last one."""
        for name in [name for name in self._lines if name[0] is not Priority.INTERACTIVE]:
            _, owner, key = name
            if key.model == model and adapter in (None, key.adapter):
                line = self._lines.pop(name)
                faster = (Priority.INTERACTIVE, owner, key)
                merged = [*line, *self._lines.get(faster, ())]
                self._lines[faster] = deque(sorted(merged, key=lambda image: image.arrived))

    def drop_cancelled(self) -> int:
        """Drop the images whose clients left, and return how many."""
        before = len(self)
        for name, line in list(self._lines.items()):
            self._set_line(name, deque(image for image in line if not image.reply.cancelled()))
        for batch in self._retries:
            batch.images = [image for image in batch.images if not image.reply.cancelled()]
        self._retries = deque(batch for batch in self._retries if batch.images)
        return before - len(self)

    def take(self, now: float, ahead: Sequence[ImageBatch] = ()) -> ImageBatch | None:
        """Return the next batch for a worker with these batches before its VAE, or None if there is none yet.

        A batch that waits behind another one has no padding and is at least as large as one of the same key, unless it
        is full: until the network is free, more images may come. So few clients share two batches evenly, and one is
        computed while the other is decoded and answered.
        """
        if self._retries:
            return self._retries.popleft()
        if not self._lines:
            return None
        lead = self._lead()
        cap = self.cap(lead.key)
        lines = self._lines_of(lead)
        queued = sum(len(self._lines[line]) for line in lines)
        limits, most = self._batch_limits[lead.key.size], min(queued, cap)
        count = limits.unpadded(most)
        if 2 * count < most:  # padding costs less than so small a batch
            count = most
        if most < cap:  # more images may come
            alike = sum(len(batch.images) for batch in ahead if batch.key == lead.key)
            if ahead and (count < alike or limits.padded(count) > count):
                return None
            if not ahead and now < lead.arrived + self._window_seconds:
                return None
        reason = "full" if count == cap else "drained" if count == queued else "unpadded"
        self._turns[lead.owner] = self._turns.pop(lead.owner)  # to the end
        return ImageBatch(lead.key, list(self._pop(lines, count)), reason)

    def _lead(self) -> QueuedImage:
        """Return the oldest image of the next owner in the best priority."""
        best = min(priority for priority, _, _ in self._lines)
        for owner in self._turns:
            heads = [line[0] for (level, name, _), line in self._lines.items() if (level, name) == (best, owner)]
            if heads:
                return min(heads, key=lambda image: image.arrived)
        raise AssertionError("every line has an owner")

    def _lines_of(self, lead: QueuedImage) -> list[_Line]:
        """Return the lines that can fill a batch: interactive before bulk, the lead's owner before others."""
        owners = [lead.owner, *(owner for owner in self._turns if owner != lead.owner)]
        levels = [(priority, owner, lead.key) for priority in Priority for owner in owners]
        return [line for line in levels if line in self._lines]

    def _pop(self, lines: list[_Line], count: int) -> Iterator[QueuedImage]:
        """Remove so many images, one of each owner in turn, one priority after the other."""
        for priority in Priority:
            level = [line for line in lines if line[0] == priority]
            while level and count:
                for line in level[:count]:
                    yield self._lines[line].popleft()
                    count -= 1
                for line in level:
                    self._set_line(line, self._lines[line])
                level = [line for line in level if line in self._lines]

    def _set_line(self, name: _Line, line: deque[QueuedImage]) -> None:
        """Set or remove a line. An owner without lines loses its turn."""
        if line:
            self._lines[name] = line
            return
        del self._lines[name]
        if all(owner != name[1] for _, owner, _ in self._lines):
            self._turns.pop(name[1], None)


def _count(images: Collection[QueuedImage], priority: Priority) -> int:
    """Count the images of this priority or a better one."""
    return len(images) if priority is max(Priority) else sum(image.priority <= priority for image in images)
