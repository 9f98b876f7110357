"""Admission, batches, the device's thread, and replies.

One batch runs and one waits ready behind it, so that the device never idles between two; everything else stays in the
batcher, where it can still be grouped better or dropped.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from service.engine.backend import Backend
from service.engine.batcher import Batcher, Work
from service.errors import GenerationFailed, Overloaded, Unavailable
from service.metrics import Metrics

log = logging.getLogger(__name__)

IN_FLIGHT = 2  # one batch on the device, one behind it
Image = NDArray[np.uint8]  # (H, W, 3)


class Engine:
    """Takes work in on the event loop and answers it from the backends."""

    def __init__(self, backends: Mapping[str, Backend], max_batch: int, queue_limit: int, metrics: Metrics) -> None:
        self._backends = backends
        self._batcher = Batcher(max_batch, queue_limit)
        self._queue_limit = queue_limit
        self._metrics = metrics
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._in_flight: set[asyncio.Task[None]] = set()
        self._image_seconds = 0.1  # running mean; the first batches set it right
        self._draining = False

    async def generate(self, model: str, prompt: str, seeds: Sequence[int], width: int, height: int) -> list[Image]:
        """One image per seed. Cancelling the call drops what still waits.

        Raises Overloaded without queueing anything, GenerationFailed for what the model failed on.
        """
        if self._draining:
            raise Unavailable("the server is shutting down; ask another one")
        self._metrics.dropped.inc(self._batcher.drop_cancelled())
        if not self._batcher.has_room(len(seeds)):
            self._metrics.refusals.labels("queue_full").inc()
            wait = max(1, math.ceil(self._image_seconds * len(self._batcher)))
            raise Overloaded(f"{len(self._batcher)} images wait already; try again in {wait} s", wait)
        loop = asyncio.get_running_loop()
        replies: list[asyncio.Future[Image]] = [loop.create_future() for _ in seeds]
        for seed, reply in zip(seeds, replies, strict=True):
            self._batcher.add(Work((model, width, height), prompt, seed, reply), time.monotonic())
        self._dispatch()
        try:
            return list(await asyncio.gather(*replies))
        finally:
            for reply in replies:  # the client left, or one of the images failed: the others are not wanted
                reply.cancel()

    async def warm_up(self) -> None:
        """Run the real path of every model once, alone and in the largest batch."""
        loop = asyncio.get_running_loop()
        for backend in self._backends.values():
            width, height = backend.card.sizes[0]
            for count in (1, self._batcher.max_batch):
                work = (["a"] * count, range(count), width, height)
                await loop.run_in_executor(self._device, backend.generate, *work)

    async def drain(self) -> None:
        """Refuse new work, finish what was accepted, and let the device go."""
        self._draining = True
        while self._in_flight:
            await asyncio.wait(self._in_flight)
        self._device.shutdown()

    def _dispatch(self) -> None:
        while len(self._in_flight) < IN_FLIGHT:
            self._metrics.dropped.inc(self._batcher.drop_cancelled())
            batch = self._batcher.take()
            if not batch:
                break
            task = asyncio.create_task(self._run(batch))
            self._in_flight.add(task)
            task.add_done_callback(self._finished)
        self._metrics.queue.set(len(self._batcher))

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        self._dispatch()

    async def _run(self, batch: list[Work]) -> None:
        """Answer a batch; one that fails is halved until the work at fault stands alone."""
        model, width, height = batch[0].key
        backend = self._backends[model]
        prompts, seeds = [work.prompt for work in batch], [work.seed for work in batch]

        def timed() -> tuple[list[tuple[Work, Image]], float, float]:
            started = time.monotonic()
            images = backend.generate(prompts, seeds, width, height)
            return list(zip(batch, images, strict=True)), started, time.monotonic()

        try:
            made, started, ended = await asyncio.get_running_loop().run_in_executor(self._device, timed)
        except Exception:
            self._metrics.failures.labels(model).inc()
            log.exception("a batch of %d images failed on %s", len(batch), model)
            if len(batch) > 1:
                middle = len(batch) // 2
                await self._run(batch[:middle])
                await self._run(batch[middle:])
            elif not batch[0].reply.done():
                batch[0].reply.set_exception(GenerationFailed("the model failed on this image; try another seed"))
            return
        self._metrics.batch_size.observe(len(batch))
        self._metrics.images.labels(model).inc(len(batch))
        self._metrics.stages.labels("device").observe(ended - started)
        self._image_seconds += 0.2 * ((ended - started) / len(batch) - self._image_seconds)
        for work, image in made:
            self._metrics.stages.labels("queue").observe(started - work.arrived)
            with contextlib.suppress(asyncio.InvalidStateError):  # its client left meanwhile
                work.reply.set_result(image)
