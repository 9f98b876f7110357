"""Which waiting work goes to the device next. Pure policy: no torch, no asyncio, no clock of its own.

Work is grouped by key (model and size), since one call of the network takes one of each. The group whose oldest work
has waited longest goes first, as much of it as fits. Nothing ever waits for company: while a batch runs, the next one
gathers by itself.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

Key = tuple[str, int, int]  # model, width, height


@dataclass(eq=False)
class Work:
    """One image to make. It carries its reply and its times, and travels whole."""

    key: Key
    prompt: str
    seed: int
    reply: Any  # what the engine answers through; only `cancelled()` is asked here
    arrived: float = field(default=0.0)  # seconds, on the caller's clock


class Batcher:
    """Queues of work by key, bounded over all."""

    def __init__(self, max_batch: int, limit: int) -> None:
        self.max_batch = max_batch
        self._limit = limit
        self._queues: dict[Key, deque[Work]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def has_room(self, images: int) -> bool:
        """Whether that many more may wait."""
        return len(self) + images <= self._limit

    def add(self, work: Work, now: float) -> None:
        """Queue work that arrives now."""
        work.arrived = now
        self._queues.setdefault(work.key, deque()).append(work)

    def drop_cancelled(self) -> int:
        """Forget work whose client left, and say how much."""
        before = len(self)
        for key, queue in list(self._queues.items()):
            alive = deque(work for work in queue if not work.reply.cancelled())
            if alive:
                self._queues[key] = alive
            else:
                del self._queues[key]
        return before - len(self)

    def take(self) -> list[Work]:
        """The next batch, oldest first; empty when nothing waits."""
        if not self._queues:
            return []
        key = min(self._queues, key=lambda k: self._queues[k][0].arrived)
        queue = self._queues[key]
        batch = [queue.popleft() for _ in range(min(self.max_batch, len(queue)))]
        if not queue:
            del self._queues[key]
        return batch
