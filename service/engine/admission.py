"""Admission of bulk work: requests wait until the queue has room for their images."""

import asyncio
from collections import deque
from collections.abc import Callable

_Waiting = tuple[int, asyncio.Future[None]]  # images, and the future that the request awaits


class BulkAdmission:
    """Requests that wait for room, on the event loop. Owners take turns; each owner's oldest request goes first.

    A request that waits for the common limit is not overtaken by smaller ones, so it cannot starve.
    """

    def __init__(self, has_room: Callable[[int, str], bool], has_own_room: Callable[[int, str], bool]) -> None:
        """`has_room` says whether so many more images of an owner may be queued, `has_own_room` by its own limit."""
        self._has_room, self._has_own_room = has_room, has_own_room
        self._lines: dict[str, deque[_Waiting]] = {}
        self._entering = False  # a request was admitted and has not queued its images yet

    async def enter(self, images: int, owner: str) -> None:
        """Wait for room. The caller queues its images before it waits for anything else."""
        if not self._lines and not self._entering and self._has_room(images, owner):
            return
        entered = asyncio.get_running_loop().create_future()
        self._lines.setdefault(owner, deque()).append((images, entered))
        self.admit()
        await entered

    def admit(self) -> None:
        """Admit waiting requests while there is room, one by one. To be called when work leaves the queue."""
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
            elif self._has_own_room(line[0][0], owner):
                return

    def release(self) -> None:
        """Admit all requests at once."""
        for _, entered in [waiting for line in self._lines.values() for waiting in line]:
            if not entered.done():
                entered.set_result(None)
        self._lines.clear()

    def _entered(self) -> None:
        self._entering = False
        self.admit()
