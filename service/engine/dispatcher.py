"""The dispatcher: requests become images in the queue, batches on workers, and results.

Each worker has one batch in its network and one ready behind it. All other images wait in the batcher, where they can
still be grouped or dropped. Every accepted image is answered: a batch that fails is split in halves until the image at
fault is alone, and the batches of a worker that dies run again elsewhere. An image depends only on its model, prompt,
seed and options, so a retry gives the same image.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from service.engine.admission import Admission
from service.engine.backend import ModelInfo, Timing
from service.engine.batcher import Batcher, BatchKey, ImageBatch, Priority, QueuedImage
from service.engine.latency_model import LatencyModel
from service.engine.messages import BatchDone, BatchFailed, ModelLoaded
from service.engine.profile import batch_cap
from service.engine.request import GenerationRequest
from service.engine.worker_handle import BATCHES_AHEAD, WorkerHandle
from service.errors import GenerationFailed, TimedOut
from service.observability.metrics import Metrics
from service.settings import Settings

if TYPE_CHECKING:
    from service.observability.tracing import Tracing

MAX_LONE_DEATHS = 5  # workers that may die while an image is alone in their oldest batch; then the image is at fault


@dataclass(frozen=True)
class GeneratedImage:
    """One image and its facts. Read-only, because requests may share it."""

    pixels: NDArray[np.uint8]  # (H, W, 3)
    tokens: int  # of the prompt, as the model sees it
    truncated: bool  # whether the model sees only the beginning of the prompt
    seconds: Mapping[str, float]  # queue, and the stages of its batch: text, model, vae; empty for a cached image


@dataclass(eq=False)
class RequestHandle:
    """Tells the caller of a request whether a worker has begun it."""

    images: Sequence[QueuedImage] = ()

    @property
    def begun(self) -> bool:
        """Whether a worker received one of its images."""
        return any(image.begun for image in self.images)


class _CacheKey(NamedTuple):
    """Everything that an image depends on."""

    batch: BatchKey  # with the model's cache key and the adapter's digest in place of their names
    prompt: str
    seed: int


class Dispatcher:
    """Queues images, sends batches to workers, and answers requests. Of the event loop's thread."""

    def __init__(self, settings: Settings, metrics: Metrics, tracing: "Tracing | None") -> None:
        self.workers: list[WorkerHandle] = []  # that are ready
        self._settings = settings
        self._metrics = metrics
        self._tracing = tracing
        self._latency = LatencyModel()
        engine = settings.engine
        limits = engine.max_queued_images, engine.max_queued_images_per_key or engine.max_queued_images
        batches = self._latency.batch_limits
        self._batcher = Batcher(engine.max_batch, *limits, batches, engine.batching_window_seconds)
        self._admission = Admission(self._batcher, self.seconds_needed, metrics)
        self._in_flight: dict[_CacheKey, QueuedImage] = {}
        self._results: LRUCache[_CacheKey, GeneratedImage] = LRUCache(
            engine.result_cache_bytes, getsizeof=lambda image: image.pixels.nbytes
        )
        self._batch_numbers = itertools.count()
        self._window: asyncio.TimerHandle | None = None  # the end of the batching window
        self._finishing: list[tuple[Callable[[BatchKey], bool], asyncio.Event]] = []

    @property
    def busy(self) -> float:
        """Share of the workers that have a batch."""
        return sum(bool(worker.batches()) for worker in self.workers) / max(1, len(self.workers))

    @property
    def queue_seconds(self) -> float:
        """Seconds that the workers need for the queued images."""
        return self.seconds_needed(self._batcher.ahead_of(Priority.BULK))

    def seconds_needed(self, images: Mapping[BatchKey, int]) -> float:
        """Seconds that the workers need for so many images of each key."""
        return self._latency.seconds(images) / max(1, len(self.workers))

    # Models

    def add_model(self, loaded: ModelLoaded) -> None:
        """Learn the times and batch sizes of a model that every worker has."""
        timings: dict[BatchKey, list[Timing]] = {}
        for timing in loaded.timings:
            timings.setdefault(BatchKey(loaded.info.name, timing.width, timing.height), []).append(timing)
        self._latency.add(loaded.info, timings)
        for (width, height), limits in zip(loaded.info.sizes, loaded.info.batches, strict=True):
            self._batcher.lower_cap(BatchKey(loaded.info.name, width, height), limits.largest)
        settings = self._settings
        # A request that meets a busy worker waits for the batches in it and then for its own.
        longest = settings.engine.target_p95_seconds and settings.engine.target_p95_seconds / (BATCHES_AHEAD + 1)
        if settings.engine.profiles_folder or settings.engine.target_p95_seconds:
            for size, known in timings.items():
                self._batcher.lower_cap(size, batch_cap(known, longest))

    def remove_model(self, name: str) -> None:
        """Forget the times and batch sizes of a model without images in the queue."""
        self._latency.forget(name)
        self._batcher.forget(name)

    def drop_results(self, model: str, adapter: str | None = None) -> None:
        """Drop cached images by the cache key of their model, or only those of an adapter by its digest."""
        for key in list(self._results):
            if key.batch.model == model and adapter in (None, key.batch.adapter):
                del self._results[key]

    async def finish(self, model: str, adapter: str | None = None) -> None:
        """Answer the accepted images of a model or of one of its adapters. The caller lets no new ones in."""
        self._batcher.promote(model, adapter)  # else bulk images could wait without end
        await self._until_none(lambda key: key.model == model and adapter in (None, key.adapter))

    async def drain(self) -> None:
        """Answer all accepted images. Bulk requests that wait for room are let through, to be refused."""
        self._admission.release()
        await self._until_none(lambda key: True)

    async def _until_none(self, matches: Callable[[BatchKey], bool]) -> None:
        waiting = matches, asyncio.Event()
        self._finishing.append(waiting)
        self._check_finished()
        try:
            await waiting[1].wait()
        finally:
            self._finishing.remove(waiting)

    def _check_finished(self) -> None:
        if self._finishing:
            running = [batch.key for worker in self.workers for batch in worker.batches()]
            keys = {*self._batcher.ahead_of(Priority.BULK), *running}
            for matches, finished in self._finishing:
                if not any(map(matches, keys)):
                    finished.set()

    # Requests

    async def wait_for_room(self, request: GenerationRequest) -> None:
        """Wait until the queue has room for a bulk request. The caller calls `generate` without waiting in between."""
        await self._admission.wait_for_room(len(set(request.seeds)), request.owner)

    async def generate(
        self, request: GenerationRequest, info: ModelInfo, handle: RequestHandle | None, *, admitted: bool
    ) -> list[GeneratedImage]:
        """Return one image per seed. `admitted` requests are never refused. Raises what `Engine.generate` does."""
        adapter = request.adapter
        scale = request.scale if adapter else 0.0
        key = BatchKey(request.model, request.width, request.height, adapter, scale, request.steps)
        content = key._replace(model=info.cache_key, adapter=adapter and info.adapters[adapter])
        timeout = self._settings.engine.request_timeout_seconds if request.timeout is None else request.timeout
        loop = asyncio.get_running_loop()
        replies: dict[int, asyncio.Future[GeneratedImage]] = {}
        images: list[QueuedImage] = []
        new: list[QueuedImage] = []
        for seed in dict.fromkeys(request.seeds):
            cache_key = _CacheKey(content, request.prompt, seed)
            same = self._in_flight.get(cache_key)
            if result := self._results.get(cache_key):
                self._metrics.cache_hits.labels("result").inc()
                replies[seed] = loop.create_future()
                replies[seed].set_result(result)
                continue
            if same and same.priority <= request.priority:
                self._metrics.cache_hits.labels("in_flight").inc()
            else:
                same = QueuedImage(
                    key, request.prompt, seed, loop.create_future(), request.owner, request.priority, cache_key
                )
                new.append(same)
            images.append(same)
            replies[seed] = same.reply
        if new and not admitted:
            running = [batch for worker in self.workers for batch in worker.batches()]
            self._admission.check(key, len(new), request.owner, request.priority, timeout, running)
        for image in new:
            self._batcher.add(image, time.monotonic())
            self._in_flight[image.cache_key] = image
        trace = self._tracing and self._tracing.current
        for image in images:
            image.waiters += 1
            if trace:
                image.traces += (trace,)
        if handle is not None:
            handle.images = images
        self.dispatch()
        try:
            await asyncio.wait(replies.values(), timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
            for reply in replies.values():
                if reply.done():
                    reply.result()  # raises its error
            if not all(reply.done() for reply in replies.values()):
                raise TimedOut(f"the images were not made within {timeout:g} s", code="deadline_exceeded")
            return [replies[seed].result() for seed in request.seeds]
        finally:
            self._release(images)

    def _release(self, images: Sequence[QueuedImage]) -> None:
        """Drop the images that no other request waits for."""
        dropped = False
        for image in images:
            image.waiters -= 1
            if not image.waiters and not image.reply.done():
                image.reply.cancel()
                self._forget(image)
                dropped = True
        if dropped:
            self._metrics.dropped.inc(self._batcher.drop_cancelled())
            self.dispatch()

    def _forget(self, image: QueuedImage) -> None:
        """Let no further request join an image."""
        if self._in_flight.get(image.cache_key) is image:
            del self._in_flight[image.cache_key]

    # Workers

    def add_worker(self, worker: WorkerHandle) -> None:
        self.workers.append(worker)
        self._metrics.workers.set(len(self.workers))
        self.dispatch()

    def remove_worker(self, worker: WorkerHandle) -> None:
        """Run the batches of a worker that failed again, split in case one of their images is the cause."""
        self.workers.remove(worker)
        self._metrics.workers.set(len(self.workers))
        for i, batch in enumerate(worker.batches()):
            if len(batch.images) > 1:
                self._split(batch)
                continue
            batch.images[0].deaths += i == 0  # the oldest batch may be the cause
            if batch.images[0].deaths < MAX_LONE_DEATHS:
                self._batcher.retry(batch)
            else:
                self._fail(batch.images[0])
        self.dispatch()

    def dispatch(self) -> None:
        """Send batches to the workers that have room, the least busy first."""
        while free := [worker for worker in self.workers if worker.free]:
            worker = min(free, key=lambda worker: len(worker.batches_ahead()))
            ahead, now = worker.batches_ahead(), time.monotonic()
            batch = self._batcher.take(now, ahead)
            if batch is None:
                if len(self._batcher) and not ahead and self._window is None:
                    delay = self._settings.engine.batching_window_seconds
                    self._window = asyncio.get_running_loop().call_later(delay, self._end_window)
                break
            self._metrics.closed.labels(batch.reason).inc()
            worker.send(next(self._batch_numbers), batch, now)
        self._admission.admit()
        self._metrics.queue.set(len(self._batcher))
        self._check_finished()

    def _end_window(self) -> None:
        self._window = None
        self.dispatch()

    def batch_done(self, worker: WorkerHandle, done: BatchDone, pixels: Sequence[NDArray[np.uint8]]) -> None:
        """Answer the requests that wait for the images (H, W, 3) of a batch."""
        now = time.monotonic()
        batch, sent, seconds = worker.answered(done.batch, now)
        if self._tracing:
            self._tracing.batch(batch, worker.name, sent, now, done)
        self._latency.learn(batch.key, len(batch.images), seconds)
        self._metrics.batch_size.observe(len(batch.images))
        self._metrics.images.labels(batch.key.model).inc(len(batch.images))
        self._metrics.cache_hits.labels("prompt").inc(done.prompt_hits)
        for stage, stage_seconds in done.seconds.items():
            self._metrics.stages.labels(stage).observe(stage_seconds)
        queue_seconds = self._metrics.stages.labels("queue")
        for i, image in enumerate(batch.images):
            pixels[i].flags.writeable = False
            queued = sent - image.arrived
            queue_seconds.observe(queued)
            result = GeneratedImage(pixels[i], done.tokens[i], done.truncated[i], {"queue": queued, **done.seconds})
            self._forget(image)
            if result.pixels.nbytes <= self._results.maxsize:
                self._results[image.cache_key] = replace(result, seconds={})
            if not image.reply.done():  # its clients left meanwhile
                image.reply.set_result(result)

    def batch_failed(self, worker: WorkerHandle, failed: BatchFailed) -> None:
        """Split a batch that failed. An image that failed alone is at fault."""
        now = time.monotonic()
        batch, sent, _ = worker.answered(failed.batch, now)
        if self._tracing:
            self._tracing.batch(batch, worker.name, sent, now, failed)
        self._metrics.failures.labels(batch.key.model).inc()
        if failed.fault == "memory":
            self._batcher.lower_cap(batch.key, len(batch.images) // 2)
        if len(batch.images) > 1:
            self._split(batch)
        elif failed.fault == "memory":
            self._fail(batch.images[0], "the worker has too little memory for this image; try again later")
        else:
            self._fail(batch.images[0])

    def _split(self, batch: ImageBatch) -> None:
        for half in batch.halves():
            self._batcher.retry(half)
        self._metrics.dropped.inc(self._batcher.drop_cancelled())

    def _fail(self, image: QueuedImage, reason: str = "the model failed on this image; try another seed") -> None:
        self._forget(image)
        if not image.reply.done():
            image.reply.set_exception(GenerationFailed(reason))
