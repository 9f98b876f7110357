"""The supervisor: starts the workers, receives their replies, and replaces those that fail."""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from service.backoff import backoff
from service.engine.dispatcher import Dispatcher
from service.engine.embeddings import EmbeddingAllocator
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
    Unload,
)
from service.engine.worker_handle import WorkerHandle, connect, inverse
from service.errors import StartError, Unavailable
from service.observability.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)

LONGEST_PAUSE = 30.0  # seconds between two attempts to start a worker
THREADS = 3  # for each worker: one starts it, one ends it, one copies its images


class Supervisor:
    """Keeps one worker running for each launch of a pool."""

    def __init__(self, pool: WorkerPool, settings: Settings, metrics: Metrics, dispatcher: Dispatcher) -> None:
        self.models: dict[str, LoadModel] = {}  # what a replaced worker loads; the catalog keeps it current
        self._pool = pool
        self._settings = settings
        self._metrics = metrics
        self._dispatcher = dispatcher
        self._allocator = EmbeddingAllocator(settings.engine.prompt_cache_bytes)
        self._tasks: list[asyncio.Task[None]] = []
        # Not the event loop's default executor, which uploads and slow folders may occupy.
        self._threads = ThreadPoolExecutor(THREADS * len(pool.launches), thread_name_prefix="engine")

    @property
    def processes(self) -> list[int]:
        """Ids of the worker processes that are ready."""
        processes = [handle.worker.process for handle in self._dispatcher.workers]
        return [process.pid for process in processes if process is not None]

    async def start(self) -> Sequence[ModelLoaded]:
        """Start every worker and return their first models. Raises StartError when one cannot start.

        Cancelling ends them at once.
        """
        self._pool.launch()
        try:
            workers = await asyncio.get_running_loop().run_in_executor(self._threads, self._pool.start)
        except asyncio.CancelledError:
            self._pool.end()
            raise
        models = workers[0].ready.models
        for command, loaded in zip(self._pool.models, models, strict=True):
            # By its current name, because the folder may hold another student later.
            self.models[loaded.info.name] = msgspec.structs.replace(command, name=loaded.info.name)
        for launch, worker in zip(self._pool.launches, workers, strict=True):
            handle = await connect(worker, self._allocator, self._threads)
            self._dispatcher.add_worker(handle)
            self._tasks.append(asyncio.create_task(self._supervise(launch, handle)))
        return models

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.gather(*(worker.close() for worker in self._dispatcher.workers))
        self._dispatcher.workers.clear()
        self._threads.shutdown(wait=False)

    async def load(self, command: LoadModel | LoadAdapter) -> ModelLoaded:
        """Load a model or adapter into every worker, also into those that join meanwhile.

        If one worker cannot load it, the others unload it. Raises InvalidRequest, or Unavailable without a worker.
        """
        loaded: dict[WorkerHandle, ModelLoaded] = {}
        try:
            while missing := [worker for worker in self._dispatcher.workers if worker not in loaded]:
                replies = await asyncio.gather(*(worker.load(command) for worker in missing), return_exceptions=True)
                pairs = list(zip(missing, replies, strict=True))
                loaded |= {worker: reply for worker, reply in pairs if isinstance(reply, ModelLoaded)}
                for reply in replies:
                    if isinstance(reply, BaseException):
                        raise reply
            if not loaded:
                raise Unavailable("no worker is ready to load it; try again")
            return next(iter(loaded.values()))
        except BaseException:
            for worker, reply in loaded.items():
                worker.unload(inverse(command, reply))
            raise

    def unload(self, command: Unload) -> None:
        """Unload a model or adapter that has no images on the way from every worker."""
        for worker in self._dispatcher.workers:
            worker.unload(command)

    async def _supervise(self, launch: Launch, worker: WorkerHandle) -> None:
        """Receive a worker's replies. When it fails, return its batches to the queue and start another worker."""
        while True:
            reason = await self._receive(worker)
            batches = len(worker.batches())
            log.error("the worker on %s %s; its %d batches run again", worker.name, reason, batches)
            self._metrics.restarts.labels(reason).inc()
            self._dispatcher.remove_worker(worker)
            await worker.close()
            worker = await self._restart(launch)
            self._dispatcher.add_worker(worker)

    async def _restart(self, launch: Launch) -> WorkerHandle:
        """Start a worker with the current models, with growing pauses between failed attempts."""
        pauses = backoff(1.0, LONGEST_PAUSE)
        while True:
            models = list(self.models.values())
            try:
                worker = await self._start(launch, models)
            except StartError as error:
                pause = next(pauses)
                log.error("a worker could not be restarted; next attempt in %.0f s: %s", pause, error)
                await asyncio.sleep(pause)
                continue
            if models == list(self.models.values()):
                return worker
            log.info("models were loaded or unloaded while a worker started; it is started again")
            await worker.close()

    async def _start(self, launch: Launch, models: Sequence[LoadModel]) -> WorkerHandle:
        """Start a worker and wait until it is ready. Cancelling ends it at once, even while it loads."""
        worker, loop = launch(models), asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, worker.wait)
            return await connect(worker, self._allocator, self._threads)
        except BaseException:
            await loop.run_in_executor(self._threads, worker.end)
            raise

    async def _receive(self, worker: WorkerHandle) -> str:
        """Handle a worker's replies until it dies, goes silent, hangs or delivers incomplete pixels. Returns which."""
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
                    self._metrics.device_memory.labels(worker.name).set(reply.memory_bytes)
                case NetworkDone():
                    worker.network_done(reply.batch)
                case BatchDone():
                    try:
                        pixels = await loop.run_in_executor(self._threads, worker.pixels, reply.batch)
                    except (EOFError, OSError):
                        log.exception("the pixels of a batch cannot be read")
                        return "incomplete"
                    self._dispatcher.batch_done(worker, reply, pixels)
                case BatchFailed():
                    self._dispatcher.batch_failed(worker, reply)
                case ModelLoaded() | LoadFailed():
                    worker.loaded(reply)
            self._dispatcher.dispatch()
            if worker.longest(time.monotonic()) > self._settings.engine.batch_timeout_seconds:
                return "hung"
