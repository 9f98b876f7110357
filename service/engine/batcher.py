"""Which waiting work goes to a device next. Pure policy: no torch, no asyncio, no clock of its own.

All images of a batch have one model, size, number of steps, and adapter at one scale, as the network requires.
Interactive work goes before bulk work, owners (API keys) take turns, and an owner's oldest work leads; the rest of the
batch is filled from what waits for the same, one image of each owner in turn.

Models compute blocks of `rows` images and pad what is less, so batches are cut at whole blocks. While a device is busy
only whole blocks are taken: an image that would be padded for is better off waiting for company until the device is
free, and then goes at once, unless the batcher was told to linger.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple


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
    """Lower goes first."""

    INTERACTIVE = 0
    BATCH = 1


@dataclass(eq=False)
class QueuedImage:
    """One image to make. It carries its reply and its times, and travels whole."""

    key: BatchKey
    prompt: str
    seed: int
    reply: Any  # what the engine answers through; only `cancelled()` is asked here
    owner: str = ""
    priority: Priority = Priority.INTERACTIVE  # decides which requests count it against the limits
    arrived: float = field(default=0.0)  # seconds, on the caller's clock
    wanted: int = 1  # requests that wait for it
    begun: bool = False  # whether a device was given it
    traces: tuple[Any, ...] = ()  # of the requests that wait for it; carried for the engine
    deaths: int = 0  # workers that died while it was their oldest, and alone


@dataclass(eq=False)
class ImageBatch:
    """Work for one call of the network. `reason` is why it was closed: full, block, drained or retry."""

    key: BatchKey
    work: list[QueuedImage]
    reason: str

    def halves(self) -> Iterator["ImageBatch"]:
        """The batch in two, so that what fails in it ends up alone."""
        middle = len(self.work) // 2
        for part in (self.work[:middle], self.work[middle:]):
            yield ImageBatch(self.key, part, "retry")


_Line = tuple[Priority, str, BatchKey]  # owner in the middle


class Batcher:
    """Work that waits, bounded over all and for each owner."""

    def __init__(
        self, max_batch: int, limit: int, owner_limit: int, rows: Mapping[str, int], linger_seconds: float = 0.0
    ) -> None:
        """`rows` is each model's block, read at every batch; `linger_seconds` what a lone image waits for company."""
        self._max_batch = max_batch
        self._limit = limit
        self._owner_limit = owner_limit
        self._rows = rows
        self._linger_seconds = linger_seconds
        self._caps: dict[BatchKey, int] = {}
        self._lines: dict[_Line, deque[QueuedImage]] = {}
        self._turns: dict[str, None] = {}  # owners that wait, the next to lead first
        self._retries: deque[ImageBatch] = deque()

    def __len__(self) -> int:
        """Images that wait, retries too."""
        return sum(map(len, self._lines.values())) + sum(len(batch.work) for batch in self._retries)

    def missing_room(self, images: int, owner: str, priority: Priority) -> int:
        """How many images must leave the queue before `images` more of an owner fit. Lower priorities do not count."""
        waiting = sum(_count(work, priority) for work in self._lines.values())
        waiting += sum(_count(batch.work, priority) for batch in self._retries)
        return max(waiting + images - self._limit, self.missing_own_room(images, owner, priority))

    def missing_own_room(self, images: int, owner: str, priority: Priority) -> int:
        """The same for the limit of each owner alone, whatever others have queued."""
        own = sum(_count(line, priority) for (_, name, _), line in self._lines.items() if name == owner)
        return max(0, own + images - self._owner_limit)

    def ahead_of(self, priority: Priority) -> dict[BatchKey, int]:
        """Images by key that wait with this priority or a better one."""
        counts: dict[BatchKey, int] = {}
        for (level, _, key), line in self._lines.items():
            if level <= priority:
                counts[key] = counts.get(key, 0) + len(line)
        for batch in self._retries:
            counts[batch.key] = counts.get(batch.key, 0) + len(batch.work)
        return counts

    def cap(self, key: BatchKey) -> int:
        """Images in one batch at most."""
        return self._caps.get(key.size, self._max_batch)

    def lower_cap(self, key: BatchKey, cap: int) -> None:
        """Make batches of a key no larger than this from now on; at least one image always goes."""
        self._caps[key.size] = max(1, min(cap, self.cap(key)))

    def forget(self, model: str) -> None:
        """Drop what was learnt of a model that nothing waits for any more."""
        self._caps = {key: cap for key, cap in self._caps.items() if key.model != model}

    def add(self, work: QueuedImage, now: float) -> None:
        """Queue work that arrives now."""
        work.arrived = now
        self._turns.setdefault(work.owner)
        self._lines.setdefault((work.priority, work.owner, work.key), deque()).append(work)

    def retry(self, batch: ImageBatch) -> None:
        """Run what is still wanted of a batch again, before everything else and in no other company."""
        batch.work = [work for work in batch.work if not work.reply.cancelled()]
        if batch.work:
            self._retries.append(batch)

    def promote(self, model: str, adapter: str | None) -> None:
        """Let what waits of a model, or of its adapter, go as interactive work does: somebody waits for its end."""
        for name in [name for name in self._lines if name[0] is not Priority.INTERACTIVE]:
            _, owner, key = name
            if key.model == model and adapter in (None, key.adapter):
                line = self._lines.pop(name)
                faster = (Priority.INTERACTIVE, owner, key)
                merged = [*line, *self._lines.get(faster, ())]
                self._lines[faster] = deque(sorted(merged, key=lambda work: work.arrived))

    def drop_cancelled(self) -> int:
        """Forget work whose clients left, and say how much."""
        before = len(self)
        for name, line in list(self._lines.items()):
            self._keep(name, deque(work for work in line if not work.reply.cancelled()))
        for batch in self._retries:
            batch.work = [work for work in batch.work if not work.reply.cancelled()]
        self._retries = deque(batch for batch in self._retries if batch.work)
        return before - len(self)

    def take(self, now: float, idle: bool) -> ImageBatch | None:
        """The next batch for a device; None when nothing waits, or better waits on. `idle`: the device does nothing."""
        if self._retries:
            return self._retries.popleft()
        if not self._lines:
            return None
        lead = self._lead()
        cap = self.cap(lead.key)
        rows = min(self._rows[lead.key.model], cap)
        lines = self._lines_of(lead)
        waiting = sum(len(self._lines[line]) for line in lines)
        if waiting < rows and not idle:
            return None
        if waiting < cap and idle and now < lead.arrived + self._linger_seconds:
            return None
        count = min(waiting, cap) if waiting < rows else min(waiting, cap) // rows * rows
        reason = "full" if count == cap else "drained" if count == waiting else "block"
        self._turns[lead.owner] = self._turns.pop(lead.owner)  # to the end
        return ImageBatch(lead.key, list(self._pick(lines, count)), reason)

    def _lead(self) -> QueuedImage:
        """The work that goes next: of the best priority, of the owner whose turn it is, the oldest."""
        best = min(priority for priority, _, _ in self._lines)
        for owner in self._turns:
            heads = [line[0] for (level, name, _), line in self._lines.items() if (level, name) == (best, owner)]
            if heads:
                return min(heads, key=lambda work: work.arrived)
        raise AssertionError("every line has an owner")

    def _lines_of(self, lead: QueuedImage) -> list[_Line]:
        """Lines that a batch can be filled from: interactive before bulk, then owners in turn, the lead's own first."""
        owners = [lead.owner, *(owner for owner in self._turns if owner != lead.owner)]
        levels = [(priority, owner, lead.key) for priority in Priority for owner in owners]
        return [line for line in levels if line in self._lines]

    def _pick(self, lines: list[_Line], count: int) -> Iterator[QueuedImage]:
        """So many images, one of each owner in turn, a priority after the other."""
        for priority in Priority:
            level = [line for line in lines if line[0] == priority]
            while level and count:
                for line in level[:count]:
                    yield self._lines[line].popleft()
                    count -= 1
                for line in level:
                    self._keep(line, self._lines[line])
                level = [line for line in level if line in self._lines]

    def _keep(self, name: _Line, line: deque[QueuedImage]) -> None:
        """Set a line; one that is empty goes, and its owner's turn with the last of them."""
        if line:
            self._lines[name] = line
            return
        del self._lines[name]
        if all(owner != name[1] for _, owner, _ in self._lines):
            self._turns.pop(name[1], None)


def _count(work: Collection[QueuedImage], priority: Priority) -> int:
    """Images of this priority or a better one."""
    return len(work) if priority is max(Priority) else sum(each.priority <= priority for each in work)
