"""Admission to the queue: interactive requests are refused when it is full, the lines of batches wait for room."""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from service.engine.batcher import Batcher, BatchKey, ImageBatch, Priority
from service.errors import Overloaded
from service.observability.metrics import Metrics

_Waiting = tuple[int, asyncio.Future[None]]  # images, and the future that the request awaits


class Admission:
    """Refuses requests, or lets bulk requests wait, on the event loop. Images of bulk work take no interactive room.

    Owners of waiting requests take turns, and each owner's oldest request goes first. A request that waits for the
    common limit is not overtaken by smaller ones, so it cannot starve.
    """

    def __init__(
        self, queue: Batcher, seconds_needed: Callable[[Mapping[BatchKey, int]], float], metrics: Metrics
    ) -> None:
        """`seconds_needed` estimates the time of the workers for so many images of each key."""
        self._queue = queue
        self._seconds_needed = seconds_needed
        self._metrics = metrics
        self._lines: dict[str, deque[_Waiting]] = {}
        self._entering = False  # a request was admitted and has not queued its images yet

    def check(
        self, key: BatchKey, images: int, owner: str, priority: Priority, timeout: float, running: Sequence[ImageBatch]
    ) -> None:
        """Raise Overloaded if the queue is full or the timeout too short, with the seconds to wait before a retry."""
        ahead = self._queue.ahead_of(priority)
        position = sum(ahead.values())
        if missing := self._queue.missing_room(images, owner, priority):
            message = f"{position} images are queued already"
            self._refuse("queue_full", message, self._seconds_needed({key: missing}), position)
        for batch in running:
            ahead[batch.key] = ahead.get(batch.key, 0) + len(batch.images)
        if not ahead:
            return  # an idle server tries it, and learns how long it takes
        ahead[key] = ahead.get(key, 0) + images
        needed = self._seconds_needed(ahead)
        if needed > timeout:
            message = f"the images would take {needed:.1f} s, not {timeout:g} s"
            self._refuse("deadline_unreachable", message, needed - timeout, position)

    def _refuse(self, reason: str, message: str, seconds: float, position: int) -> None:
        self._metrics.refusals.labels(reason).inc()
        raise Overloaded(message, seconds, reason, position)

    async def wait_for_room(self, images: int, owner: str) -> None:
        """Wait until the queue has room. The caller queues its images before it awaits anything else."""
        if not self._lines and not self._entering and self._has_room(images, owner):
            return
        entered = asyncio.get_running_loop().create_future()
        self._lines.setdefault(owner, deque()).append((images, entered))
        self.admit()
        await entered

    def admit(self) -> None:
        """Admit waiting requests while there is room, one by one. Called when images leave the queue."""
        if self._entering:
            return
        for owner, line in list(self._lines.items()):
            while line and line[0][1].done():  # cancelled
                line.popleft()
            if not line:
                del self._lines[owner]
            elif self._has_room(line[0][0], owner):
                self._lines[owner] = self._lines.pop(owner)  # to the end
                self._entering = True
                line.popleft()[1].set_result(None)
                asyncio.get_running_loop().call_soon(self._entered)  # runs after the request, which was woken first
                return
            elif not self._queue.missing_own_room(line[0][0], owner, Priority.BULK):
                return

    def release(self) -> None:
        """Admit all waiting requests at once."""
        for _, entered in itertools.chain.from_iterable(self._lines.values()):
            if not entered.done():
                entered.set_result(None)
        self._lines.clear()

    def _has_room(self, images: int, owner: str) -> bool:
        return not self._queue.missing_room(images, owner, Priority.BULK)

    def _entered(self) -> None:
        self._entering = False
        self.admit()
