"""Bulk work in front of a full queue: which owner enters next."""

import asyncio

from service.engine.admission import Admission
from service.engine.batcher import BatchKey, Priority
from service.observability.metrics import Metrics


class Queue:
    """A queue of ten images that is full at first and limits each owner."""

    def __init__(self, **limits: int) -> None:
        self.room, self.limits = 0, limits
        self.entered: list[str] = []
        self.admission = Admission(self, lambda images: 0.0, Metrics())

    def missing_room(self, images: int, owner: str, priority: Priority) -> int:
        return max(images - self.room, self.missing_own_room(images, owner, priority))

    def missing_own_room(self, images: int, owner: str, priority: Priority) -> int:
        return max(0, images - self.limits.get(owner, 10))

    def ahead_of(self, priority: Priority) -> dict[BatchKey, int]:
        return {}

    async def request(self, images: int, owner: str) -> None:
        await self.admission.wait_for_room(images, owner)
        self.room -= images
        self.entered.append(owner)

    async def leave(self, images: int) -> None:
        """Let this many images leave, one at a time."""
        for _ in range(images):
            self.room += 1
            self.admission.admit()
            for _ in range(3):  # what was admitted goes on
                await asyncio.sleep(0)


def test_small_requests_do_not_overtake_a_large_one_for_ever():
    async def test() -> None:
        queue = Queue()
        waiting = [asyncio.create_task(queue.request(1, "small")) for _ in range(20)]
        waiting.append(asyncio.create_task(queue.request(4, "large")))
        await asyncio.sleep(0)
        await queue.leave(24)
        assert queue.entered.index("large") == 1  # after the one that came first
        await asyncio.gather(*waiting)

    asyncio.run(test())


def test_an_owner_at_its_own_limit_holds_up_nobody_else():
    async def test() -> None:
        queue = Queue(busy=0)
        waiting = [asyncio.create_task(queue.request(1, owner)) for owner in ("busy", "free", "free")]
        await asyncio.sleep(0)
        await queue.leave(3)
        assert queue.entered == ["free", "free"]
        queue.limits["busy"] = 1
        queue.admission.admit()
        await asyncio.gather(*waiting)

    asyncio.run(test())
