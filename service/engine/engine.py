"""Admission, batches, workers, and replies.

Every worker has one batch in its network and one waiting ready behind it, so that a device never idles between two;
everything else stays in the batcher, where it can still be grouped better or dropped. What is accepted is answered: a
batch that fails is halved until the work at fault stands alone, and a worker that dies or goes silent is replaced
while its batches run again elsewhere. Since an image depends on its prompt and seed alone, they come out the same.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from service.engine.admission import BulkAdmission
from service.engine.backend import ModelInfo, Pixels, Timing
from service.engine.batcher import Batcher, BatchKey, ImageBatch, Priority, QueuedImage
from service.engine.cache import Cache
from service.engine.embeddings import EmbeddingAllocator
from service.engine.latency_model import LatencyModel
from service.engine.launch import Launch, WorkerPool
from service.engine.messages import (
    BatchDone,
    BatchFailed,
    Heartbeat,
    LoadAdapter,
    LoadFailed,
    LoadModel,
    ModelLoaded,
    NetworkDone,
    UnloadAdapter,
    UnloadModel,
)
from service.engine.profile import batch_cap
from service.engine.request import GenerationRequest
from service.engine.worker_handle import AHEAD, WorkerHandle, connect, inverse
from service.errors import (
    GenerationFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    StartError,
    TimedOut,
    Unavailable,
    no_model,
    quoted,
)
from service.observability.metrics import Metrics
from service.settings import Settings

if TYPE_CHECKING:
    from service.observability.tracing import Tracing

log = logging.getLogger(__name__)

LONE_DEATHS = 5  # workers that may die while an image is their oldest and alone; then it is at fault
LONGEST_PAUSE = 30.0  # seconds between two attempts to start a worker
THREADS = 3  # for each worker: one starts it, one ends it, one copies its images


@dataclass(frozen=True)
class GeneratedImage:
    """One image, and what is to be said of it. Read-only: a cache may give it to several."""

    pixels: NDArray[np.uint8]  # (H, W, 3)
    tokens: int  # of the prompt, as the model saw it
    truncated: bool  # whether the model saw only the prompt's beginning
    seconds: Mapping[str, float]  # queue, and the stages of its batch: text, model, vae; none where a cache had it


@dataclass(eq=False)
class RequestHandle:
    """Work that a request waits for, for a caller who would rather ask for something else while nothing has begun."""

    work: Sequence[QueuedImage] = ()

    @property
    def begun(self) -> bool:
        """Whether a device was given some of it."""
        return any(work.begun for work in self.work)


# All that determines them: the model's identity, prompt, seed, size, the adapter's digest, its scale, the steps.
_Pixels = tuple[str, str, int, int, int, str | None, float, int]


class Engine:
    """Takes work in on the event loop and answers it from the workers."""

    def __init__(
        self, pool: WorkerPool, settings: Settings, metrics: Metrics, tracing: "Tracing | None" = None
    ) -> None:
        self._cards: dict[str, ModelInfo] = {}  # by model; there once it has started
        self._models: dict[str, LoadModel] = {}  # what a worker loads for each of them
        self._changing = asyncio.Lock()  # models are loaded and unloaded one by one
        self._leaving: tuple[str, str | None] | None = None  # a model, or its adapter, that finishes its work and goes
        self._left = asyncio.Event()
        self._pool = pool
        self._settings = settings
        self._metrics = metrics
        self._tracing = tracing
        self._pace = LatencyModel()
        own = settings.engine
        limits = own.max_queued_images, own.max_queued_images_per_key or own.max_queued_images
        self._batcher = Batcher(own.max_batch, *limits, self._pace.rows, own.batching_window_seconds)
        self._bulk = BulkAdmission(
            lambda images, owner: not self._batcher.missing_room(images, owner, Priority.BATCH),
            lambda images, owner: not self._batcher.missing_own_room(images, owner, Priority.BATCH),
        )
        self._workers: list[WorkerHandle] = []
        self._supervisors: list[asyncio.Task[None]] = []
        self._making: dict[_Pixels, QueuedImage] = {}
        self._made: Cache[_Pixels, GeneratedImage] = Cache(settings.engine.result_cache_bytes)
        self._allocator = EmbeddingAllocator(settings.engine.prompt_cache_bytes)
        # Not the event loop's default executor, which uploads and slow folders may occupy.
        self._threads = ThreadPoolExecutor(THREADS * len(pool.launches), thread_name_prefix="engine")
        self._numbers = itertools.count()
        self._lingering: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._draining = False

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """Of the models that take work, the default one first."""
        models = dict(self._cards)
        match self._leaving:
            case model, None:
                del models[model]
            case model, adapter:
                left = {name: digest for name, digest in models[model].adapters.items() if name != adapter}
                models[model] = replace(models[model], adapters=left)
        return models

    @property
    def open(self) -> bool:
        """Whether new work is taken: also while a worker is being replaced, since what waits for it is bounded."""
        return bool(self._cards) and not self._draining

    @property
    def ready(self) -> bool:
        """Whether new work is taken and there is a worker for it."""
        return self.open and bool(self._workers)

    @property
    def processes(self) -> list[int]:
        """Ids of the worker processes that are ready."""
        return [worker.worker.process.pid for worker in self._workers if worker.worker.process is not None]

    @property
    def busy(self) -> float:
        """Share of the workers that have work."""
        return sum(bool(worker.outstanding()) for worker in self._workers) / max(1, len(self._workers))

    @property
    def queue_seconds(self) -> float:
        """Seconds in which the workers would make what waits for them."""
        return self._needed(self._batcher.ahead_of(Priority.BATCH))

    def info(self, model: str) -> ModelInfo:
        """That of a model that takes work. Raises NotFound."""
        info = self.models.get(model)
        if info is None:
            raise no_model(model)
        return info

    def check_open(self) -> None:
        """Raise Unavailable unless new work is taken."""
        if not self.open:
            raise Unavailable("the server is starting or shutting down; ask another one")

    async def start(self) -> None:
        """Wait for every worker. Raises StartError when one cannot start."""
        workers = await asyncio.get_running_loop().run_in_executor(self._threads, self._pool.start)
        for loaded, order in zip(workers[0].ready.models, self._pool.models, strict=True):
            # By the name of now: the folder may come to hold another student.
            self._add(loaded, LoadModel(order.folder, loaded.info.name, order.adapters))
        for launch, started in zip(self._pool.launches, workers, strict=True):
            worker = await connect(started, self._allocator, self._threads)
            self._join(worker)
            self._supervisors.append(asyncio.create_task(self._supervise(launch, worker)))

    async def generate(
        self, request: GenerationRequest, handle: RequestHandle | None = None, *, patient: bool = False
    ) -> list[GeneratedImage]:
        """One image per seed. Cancelling the call drops what still waits and nobody else wants.

        `asked` is told of the work. Raises Overloaded without queueing anything when the queue is full or the images
        could not be there in time, TimedOut when they were not, GenerationFailed for what the model failed on, NotFound
        for a model or adapter that is not loaded, InvalidRequest for a number of steps that the model does not support,
        Unavailable while the server starts or drains. `patient` waits until the queue has room for bulk work and never
        raises Overloaded.
        """
        prompt, seeds, priority, owner = request.prompt, request.seeds, request.priority, request.owner
        if patient:
            await self._bulk.enter(len(set(seeds)), owner)
        self.check_open()
        info = self.info(request.model)
        info.check_steps(request.steps)
        adapter = request.adapter
        if adapter is not None and adapter not in info.adapters:
            raise NotFound(
                f"{info.name} has no adapter {adapter!r}; it has {[*info.adapters]}", "lora", "adapter_not_found"
            )
        timeout = self._settings.engine.request_timeout_seconds if request.timeout is None else request.timeout
        scale = request.scale if adapter else 0.0
        key = BatchKey(info.name, request.width, request.height, adapter, scale, request.steps)
        replies: dict[int, asyncio.Future[GeneratedImage]] = {}
        wanted: list[QueuedImage] = []
        new: list[int] = []
        for seed in dict.fromkeys(seeds):
            same = self._same(key, prompt, seed)
            making = self._making.get(same)
            if image := self._made.get(same):
                self._metrics.cache_hits.labels("result").inc()
                replies[seed] = asyncio.get_running_loop().create_future()
                replies[seed].set_result(image)
            elif making and making.priority <= priority:
                self._metrics.cache_hits.labels("in_flight").inc()
                wanted.append(making)
                replies[seed] = making.reply
            else:
                new.append(seed)
        if new and not patient:
            self._admit(key, len(new), owner, priority, timeout)
        for work in wanted:
            work.wanted += 1
        for seed in new:
            reply: asyncio.Future[GeneratedImage] = asyncio.get_running_loop().create_future()
            work = QueuedImage(key, prompt, seed, reply, owner, priority)
            self._batcher.add(work, time.monotonic())
            self._making[self._pixels(work)] = work
            wanted.append(work)
            replies[seed] = reply
        if handle is not None:
            handle.work = wanted
        if self._tracing and (trace := self._tracing.current):
            for work in wanted:
                work.traces += (trace,)
        self._dispatch()
        try:
            await asyncio.wait(replies.values(), timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
            for reply in replies.values():
                if reply.done():
                    reply.result()  # raises what the model failed on
            if not all(reply.done() for reply in replies.values()):
                raise TimedOut(f"the images were not made within {timeout:g} s", code="deadline_exceeded")
            return [replies[seed].result() for seed in seeds]
        finally:
            self._release(wanted)

    async def load(self, folder: Path, name: str | None = None) -> ModelInfo:
        """Load a student into every worker, while they go on; a worker that is replaced later loads it too.

        It takes work from when every worker has it. `name` None is the student's own. Raises InvalidRequest for a
        folder that cannot be loaded or a name that is taken, and then no worker keeps it; Unavailable when a worker
        dies meanwhile or none is ready.
        """
        async with self._changing:
            self.check_open()
            self._check_free(name)
            order = LoadModel(str(folder.absolute()), name)
            first = await self._everywhere(order)
            self._add(first, LoadModel(order.folder, first.info.name))
            return first.info

    async def load_adapter(self, model: str, folder: Path, name: str) -> ModelInfo:
        """Read a LoRA adapter for a model into every worker, as `load` does a student; the model's new card."""
        async with self._changing:
            self.check_open()
            if name in self.info(model).adapters:
                raise InvalidRequest(f"{model} has an adapter {name!r} already; unload it first", "name")
            order = LoadAdapter(model, name, str(folder.absolute()))
            self._cards[model] = (await self._everywhere(order)).info
            loaded = self._models[model]
            self._models[model] = LoadModel(loaded.folder, loaded.name, {**loaded.adapters, name: order.folder})
            return self._cards[model]

    async def unload_adapter(self, model: str, name: str) -> None:
        """Take no more work with an adapter, finish what was accepted, then let go of it. Raises NotFound."""
        async with self._changing:
            info = self.info(model)
            if name not in info.adapters:
                raise NotFound(f"{model} has no adapter {quoted(name)}", "name", "adapter_not_found")
            await self._finish(model, name)
            left = {other: digest for other, digest in info.adapters.items() if other != name}
            self._cards[model] = replace(info, adapters=left)
            loaded = self._models[model]
            folders = {other: folder for other, folder in loaded.adapters.items() if other != name}
            self._models[model] = LoadModel(loaded.folder, loaded.name, folders)
            digest = info.adapters[name]
            self._made.drop(lambda key: (key[0], key[5]) == (info.cache_key, digest))
            for worker in self._workers:
                worker.remove(UnloadAdapter(model, name))

    async def _everywhere(self, order: LoadModel | LoadAdapter) -> ModelLoaded:
        """Have every worker load something, those that join meanwhile too; where one cannot, none keeps it."""
        loaded: dict[WorkerHandle, ModelLoaded] = {}
        try:
            while asked := [worker for worker in self._workers if worker not in loaded]:
                answers = await asyncio.gather(*(worker.add(order) for worker in asked), return_exceptions=True)
                pairs = list(zip(asked, answers, strict=True))
                loaded |= {worker: answer for worker, answer in pairs if isinstance(answer, ModelLoaded)}
                for _, answer in pairs:
                    if isinstance(answer, BaseException):
                        raise answer
            if not loaded:
                raise Unavailable("no worker is ready to load it; try again")
            first = next(iter(loaded.values()))
            if isinstance(order, LoadModel):
                self._check_free(first.info.name)
            return first
        except BaseException:
            for worker, answer in loaded.items():
                worker.remove(inverse(order, answer))
            raise

    async def _finish(self, model: str, adapter: str | None) -> None:
        """Take no more work for a model or its adapter, and wait for what was accepted."""
        self._leaving = model, adapter
        self._batcher.promote(model, adapter)  # all changes of models wait for it, and bulk work may wait for ever
        self._left.clear()
        self._check_idle()
        try:
            await self._left.wait()
        finally:
            self._leaving = None

    async def unload(self, name: str) -> None:
        """Take no more work for a model, finish what was accepted, then let go of it and of its images in the cache.

        Raises NotFound when it is not loaded, InvalidRequest when it is the only one.
        """
        async with self._changing:
            info = self.info(name)
            if len(self._cards) == 1:
                raise InvalidRequest("this is the only model; load another one first", "model", "last_model")
            await self._finish(name, None)
            del self._cards[name], self._models[name]
            self._pace.forget(name)
            self._batcher.forget(name)
            if all(other.cache_key != info.cache_key for other in self._cards.values()):
                self._made.drop(lambda key: key[0] == info.cache_key)
            for worker in self._workers:
                worker.remove(UnloadModel(name))

    def _add(self, loaded: ModelLoaded, order: LoadModel) -> None:
        """Take work for a model that every worker has."""
        info = loaded.info
        self._cards[info.name] = info
        self._models[info.name] = order
        timings: dict[BatchKey, list[Timing]] = {}
        for timing in loaded.timings:
            timings.setdefault(BatchKey(info.name, timing.width, timing.height), []).append(timing)
        self._pace.add(info, timings)
        own = self._settings.engine
        # Who meets a full device waits for the batch in it and the one behind, then for the own one.
        slowest = own.target_p95_seconds and own.target_p95_seconds / (AHEAD + 1)
        if own.profiles_folder or own.target_p95_seconds:
            for size, known in timings.items():
                self._batcher.lower_cap(size, batch_cap(known, slowest))

    def _check_free(self, name: str | None) -> None:
        if name in self._cards or name in self._settings.aliases:
            raise InvalidRequest(f"the name {name!r} is taken; unload that model, or take another name", "name")

    async def drain(self) -> None:
        """Refuse new work, finish what was accepted, and end the workers."""
        self._draining = True
        self._bulk.release()
        if self._workers or len(self._batcher):
            self._check_idle()
            await self._idle.wait()
        for supervisor in self._supervisors:
            supervisor.cancel()
        if self._supervisors:
            await asyncio.wait(self._supervisors)
        await asyncio.gather(*(worker.leave() for worker in self._workers))
        self._workers.clear()
        self._threads.shutdown(wait=False)

    def _admit(self, key: BatchKey, images: int, owner: str, priority: Priority, timeout: float) -> None:
        """Raise Overloaded with the time after which so many images would be taken."""
        ahead = self._batcher.ahead_of(priority)
        position = sum(ahead.values())
        if excess := self._batcher.missing_room(images, owner, priority):
            wait = self._needed({key: excess})
            self._refuse("queue_full", f"{position} images wait already", wait, position)
        for batch in itertools.chain.from_iterable(worker.outstanding() for worker in self._workers):
            ahead[batch.key] = ahead.get(batch.key, 0) + len(batch.work)
        if not ahead:
            return  # on an empty server, what is tried is what teaches the engine better
        ahead[key] = ahead.get(key, 0) + images
        needed = self._needed(ahead)
        if needed > timeout:
            message = f"the images would take {needed:.1f} s, not {timeout:g} s"
            self._refuse("deadline_unreachable", message, needed - timeout, position)

    def _needed(self, images: Mapping[BatchKey, int]) -> float:
        """Seconds that the workers need for so many images of each key."""
        return self._pace.seconds(images) / max(1, len(self._workers))

    def _refuse(self, reason: str, sentence: str, seconds: float, position: int) -> None:
        self._metrics.refusals.labels(reason).inc()
        raise Overloaded(sentence, seconds, reason, position)

    def _pixels(self, work: QueuedImage) -> _Pixels:
        return self._same(work.key, work.prompt, work.seed)

    def _same(self, key: BatchKey, prompt: str, seed: int) -> _Pixels:
        info = self._cards[key.model]
        adapter = None if key.adapter is None else info.adapters[key.adapter]
        return info.cache_key, prompt, seed, key.width, key.height, adapter, key.scale, key.steps

    def _release(self, wanted: Sequence[QueuedImage]) -> None:
        """A request is over: what it alone still waited for is dropped."""
        left = False
        for work in wanted:
            work.wanted -= 1
            if not work.wanted and not work.reply.done():
                work.reply.cancel()
                self._forget(work)
                left = True
        if left:
            self._metrics.dropped.inc(self._batcher.drop_cancelled())
            self._dispatch()

    def _forget(self, work: QueuedImage) -> None:
        """Nobody can join this work any more."""
        if self._making.get(self._pixels(work)) is work:
            del self._making[self._pixels(work)]

    def _dispatch(self) -> None:
        """Give the workers what they have room for, the idlest first."""
        while free := [worker for worker in self._workers if worker.free]:
            worker = min(free, key=lambda worker: worker.load)
            now = time.monotonic()
            batch = self._batcher.take(now, idle=worker.load == 0)
            if batch is None:
                if len(self._batcher) and worker.load == 0 and self._lingering is None:
                    delay = self._settings.engine.batching_window_seconds
                    self._lingering = asyncio.get_running_loop().call_later(delay, self._stop_lingering)
                break
            self._metrics.closed.labels(batch.reason).inc()
            worker.send(next(self._numbers), batch, now)
        self._bulk.admit()
        self._metrics.queue.set(len(self._batcher))
        self._check_idle()

    def _stop_lingering(self) -> None:
        self._lingering = None
        self._dispatch()

    def _check_idle(self) -> None:
        if self._draining and not len(self._batcher) and not any(worker.outstanding() for worker in self._workers):
            self._idle.set()
        if self._leaving is not None and not self._busy(*self._leaving):
            self._left.set()

    def _busy(self, model: str, adapter: str | None) -> bool:
        """Whether a model, or one of its adapters, has work that was accepted and is not answered."""
        waiting = list(self._batcher.ahead_of(Priority.BATCH))
        running = [batch.key for worker in self._workers for batch in worker.outstanding()]
        return any(key.model == model and adapter in (None, key.adapter) for key in waiting + running)

    def _join(self, worker: WorkerHandle) -> None:
        """Give a worker work."""
        self._workers.append(worker)
        self._metrics.workers.set(len(self._workers))
        self._dispatch()

    async def _supervise(self, launch: Launch, worker: WorkerHandle) -> None:
        """Listen to a worker; when it is gone, give its batches to others and start another one in its place."""
        while True:
            reason = await self._listen(worker)
            lost = worker.outstanding()
            log.error("the worker on %s %s; its %d batches run again", worker.worker.name, reason, len(lost))
            self._metrics.restarts.labels(reason).inc()
            self._workers.remove(worker)
            self._metrics.workers.set(len(self._workers))
            for batch in lost:
                self._again(batch, suspect=batch is lost[0])
            self._dispatch()
            await worker.leave()
            worker = await self._relaunch(launch)
            self._join(worker)

    async def _relaunch(self, launch: Launch) -> WorkerHandle:
        """A worker that has the models of now, started with longer pauses between attempts that fail."""
        pause = 1.0
        while True:
            models = list(self._models.values())
            try:
                worker = await self._start(launch, models)
            except StartError as error:
                log.error("a worker could not be started again; next try in %.0f s: %s", pause, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            if models == list(self._models.values()):
                return worker
            log.info("models came or went while a worker started; it starts once more")
            await worker.leave()

    async def _start(self, launch: Launch, models: Sequence[LoadModel]) -> WorkerHandle:
        """A worker that is ready; cancelling ends it at once, whatever it still loads."""
        worker, loop = launch(models), asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, worker.wait)
            return await connect(worker, self._allocator, self._threads)
        except BaseException:
            await loop.run_in_executor(self._threads, worker.end)
            raise

    async def _listen(self, worker: WorkerHandle) -> str:
        """Take a worker's replies until it dies, goes silent, hangs or delivers incomplete pixels. Returns which."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout(self._settings.engine.heartbeat_timeout_seconds):
                    reply = await worker.receive()
            except TimeoutError:
                return "silent"
            except (EOFError, OSError):
                return "died"
            match reply:
                case Heartbeat():
                    self._metrics.device_memory.labels(worker.worker.name).set(reply.memory_bytes)
                case NetworkDone():
                    worker.advanced(reply.batch)
                case BatchDone():
                    try:
                        pixels = await loop.run_in_executor(self._threads, worker.pixels, reply.batch)
                    except (EOFError, OSError):
                        log.exception("the pixels of a batch cannot be read")
                        return "incomplete"
                    self._answer(worker, reply, pixels)
                case BatchFailed():
                    self._failed(worker, reply)
                case ModelLoaded() | LoadFailed():
                    worker.loaded(reply)
            self._dispatch()
            if worker.longest(time.monotonic()) > self._settings.engine.batch_timeout_seconds:
                return "hung"

    def _answer(self, worker: WorkerHandle, made: BatchDone, pixels: Pixels) -> None:
        """Give each image of a batch to those who wait for it."""
        pixels.flags.writeable = False
        now = time.monotonic()
        batch, sent, needed = worker.answered(made.batch, now)
        if self._tracing:
            self._tracing.batch(batch, worker.worker.name, sent, now, made)
        self._pace.learn(batch.key, len(batch.work), needed)
        self._metrics.batch_size.observe(len(batch.work))
        self._metrics.images.labels(batch.key.model).inc(len(batch.work))
        self._metrics.cache_hits.labels("prompt").inc(made.prompt_hits)
        for stage, seconds in made.seconds.items():
            self._metrics.stages.labels(stage).observe(seconds)
        for i, work in enumerate(batch.work):
            queued = sent - work.arrived
            self._metrics.stages.labels("queue").observe(queued)
            image = GeneratedImage(pixels[i], made.tokens[i], made.truncated[i], {"queue": queued, **made.seconds})
            self._forget(work)
            self._made.put(self._pixels(work), replace(image, seconds={}), image.pixels.nbytes)
            if not work.reply.done():  # its clients left meanwhile
                work.reply.set_result(image)

    def _failed(self, worker: WorkerHandle, failed: BatchFailed) -> None:
        """Halve a batch that failed; work that failed alone is at fault."""
        now = time.monotonic()
        batch, sent, _ = worker.answered(failed.batch, now)
        if self._tracing:
            self._tracing.batch(batch, worker.worker.name, sent, now, failed)
        self._metrics.failures.labels(batch.key.model).inc()
        if failed.fault == "memory":
            self._batcher.lower_cap(batch.key, len(batch.work) // 2)
        if len(batch.work) > 1:
            self._retry(batch)
        elif failed.fault == "memory":
            self._give_up(batch.work[0], "the worker has too little memory for this image; try again later")
        else:
            self._give_up(batch.work[0])

    def _again(self, batch: ImageBatch, suspect: bool) -> None:
        """Run what a dead worker had; halved, should something in it be what killed the worker."""
        if len(batch.work) > 1:
            self._retry(batch)
            return
        work = batch.work[0]
        work.deaths += suspect
        if work.deaths < LONE_DEATHS:
            self._batcher.retry(batch)
        else:
            self._give_up(work)

    def _retry(self, batch: ImageBatch) -> None:
        for half in batch.halves():
            self._batcher.retry(half)
        self._metrics.dropped.inc(self._batcher.drop_cancelled())

    def _give_up(self, work: QueuedImage, reason: str = "the model failed on this image; try another seed") -> None:
        self._forget(work)
        if not work.reply.done():
            work.reply.set_exception(GenerationFailed(reason))
