"""Bulk work in front of a full queue: who enters next."""

import asyncio

from service.engine.admission import BulkAdmission


class Queue:
    """A queue of ten images that is full at first, and keeps each owner to its own limit."""

    def __init__(self, **limits: int) -> None:
        self.room, self.limits = 0, limits
        self.entered: list[str] = []
        self.admission = BulkAdmission(lambda n, owner: n <= self.room and self.own(n, owner), self.own)

    def own(self, images: int, owner: str) -> bool:
        return images <= self.limits.get(owner, 10)

    async def request(self, images: int, owner: str) -> None:
        await self.admission.enter(images, owner)
        self.room -= images
        self.entered.append(owner)

    async def leave(self, images: int) -> None:
        """So many images leave, one at a time."""
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
