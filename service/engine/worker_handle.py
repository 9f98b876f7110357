"""`WorkerHandle`: one worker that is ready, on the event loop."""

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.engine import messages
from service.engine.batcher import ImageBatch
from service.engine.embeddings import Allocation, EmbeddingAllocator
from service.engine.launch import Worker
from service.engine.messages import LoadAdapter, LoadFailed, LoadModel, ModelLoaded, Reply, RunBatch, Unload
from service.errors import InvalidRequest, Unavailable

BATCHES_AHEAD = 2  # batches of a worker before its VAE: one in the network, one ready behind it
PIXEL_SLOTS = BATCHES_AHEAD + 2  # and one in the VAE, one after it


@dataclass(frozen=True)
class _Sent:
    """A batch without an answer."""

    batch: ImageBatch
    slot: int
    time: float
    allocations: Sequence[Allocation | None]  # of its prompts' embeddings


class WorkerHandle:
    """Sends commands to one worker and receives its replies. Knows its models, batches and free slots."""

    def __init__(
        self,
        worker: Worker,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        allocator: EmbeddingAllocator,
        threads: Executor,
    ) -> None:
        self.worker = worker
        self.name = worker.name
        self._reader = reader
        self._writer = writer
        self._allocator = allocator
        self._threads = threads
        self._models = {loaded.info.name: loaded for loaded in worker.ready.models}
        self._slots = list(range(PIXEL_SLOTS))
        self._sent: dict[int, _Sent] = {}  # by number, oldest first
        self._ahead: set[int] = set()  # numbers of batches before the VAE
        self._last_answer = 0.0
        self._loading: deque[tuple[LoadModel | LoadAdapter, asyncio.Future[ModelLoaded]]] = deque()  # oldest first

    def batches_ahead(self) -> list[ImageBatch]:
        """Return its batches before its VAE."""
        return [self._sent[number].batch for number in self._ahead]

    @property
    def free(self) -> bool:
        """Whether it takes another batch."""
        return len(self._ahead) < BATCHES_AHEAD and bool(self._slots)

    def batches(self) -> list[ImageBatch]:
        """Return the batches without an answer, oldest first."""
        return [sent.batch for sent in self._sent.values()]

    def send(self, number: int, batch: ImageBatch, now: float) -> None:
        slot = self._slots.pop()
        for image in batch.images:
            image.begun = True
        prompts, seeds = [image.prompt for image in batch.images], [image.seed for image in batch.images]
        loaded = self._models[batch.key.model]
        encoder = loaded.info.digest, loaded.environment, loaded.text_bytes  # equal ones encode to the same bits
        allocations = [self._allocator.allocate((*encoder, prompt), loaded.text_bytes) for prompt in prompts]
        self._sent[number] = _Sent(batch, slot, now, allocations)
        self._ahead.add(number)
        self._write(
            RunBatch(
                batch=number,
                key=batch.key,
                prompts=prompts,
                embedding_slots=[each.slot if each else None for each in allocations],
                seeds=seeds,
                pixel_slot=slot,
            )
        )

    def load(self, command: LoadModel | LoadAdapter) -> asyncio.Future[ModelLoaded]:
        """Load a model or adapter. The future raises InvalidRequest when that fails, Unavailable if the worker ends."""
        waiting: asyncio.Future[ModelLoaded] = asyncio.get_running_loop().create_future()
        self._loading.append((command, waiting))
        self._write(command)
        return waiting

    def unload(self, command: Unload) -> None:
        self._write(command)

    def loaded(self, reply: ModelLoaded | LoadFailed) -> None:
        """Handle the reply to the oldest `load`. What was cancelled meanwhile is unloaded again."""
        command, waiting = self._loading.popleft()
        if isinstance(reply, ModelLoaded):
            self._models[reply.info.name] = reply
        match reply:
            case ModelLoaded() if waiting.cancelled():
                self.unload(inverse(command, reply))
            case ModelLoaded():
                waiting.set_result(reply)
            case LoadFailed() if not waiting.cancelled():
                waiting.set_exception(InvalidRequest(reply.reason, "folder", "model_not_loadable"))

    async def receive(self) -> Reply:
        """Receive the next reply. Raises EOFError or OSError when the worker is gone."""
        header = await self._reader.readexactly(messages.HEADER_BYTES)
        return messages.read_reply(await self._reader.readexactly(messages.length(header)))

    def network_done(self, number: int) -> None:
        """Note that a batch has left the network."""
        self._ahead.discard(number)

    def pixels(self, number: int) -> list[NDArray[np.uint8]]:
        """Copy the images (H, W, 3) of a finished batch. Safe from any thread.

        Raises EOFError or OSError if they are incomplete.
        """
        sent = self._sent[number]
        key = sent.batch.key
        return self.worker.read(sent.slot, len(sent.batch.images), (key.height, key.width, 3))

    def answered(self, number: int, now: float) -> tuple[ImageBatch, float, float]:
        """Forget a batch. Returns it, the time it was sent, and the worker's seconds for it after the one before."""
        sent = self._sent.pop(number)
        self._slots.append(sent.slot)
        self._ahead.discard(number)
        self._release(sent)
        seconds = now - max(sent.time, self._last_answer)
        self._last_answer = now
        return sent.batch, sent.time, seconds

    def longest(self, now: float) -> float:
        """Return the seconds since its oldest batch could begin."""
        return max((now - max(sent.time, self._last_answer) for sent in self._sent.values()), default=0.0)

    async def close(self) -> None:
        """End the worker. Its process also ends if this is cancelled, as by the end of the server."""
        for _, waiting in self._loading:
            if not waiting.cancelled():
                waiting.set_exception(Unavailable("a worker ended while it loaded the model; try again"))
        self._loading.clear()
        self._writer.transport.abort()
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._threads, self.worker.end))
        for sent in self._sent.values():  # only now, because a live worker may still write to them
            self._release(sent)
        self._sent.clear()

    def _write(self, command: messages.Command) -> None:
        self._writer.write(messages.frame(command))

    @staticmethod
    def _release(sent: _Sent) -> None:
        for allocation in sent.allocations:
            if allocation is not None:
                allocation.batches -= 1


def inverse(command: LoadModel | LoadAdapter, reply: ModelLoaded) -> Unload:
    """Return the command that undoes a successful load."""
    return Unload(reply.info.name, command.name if isinstance(command, LoadAdapter) else None)


async def connect(worker: Worker, allocator: EmbeddingAllocator, threads: Executor) -> WorkerHandle:
    """Return the handle of a worker that is ready. `threads` run its blocking calls."""
    worker.connection.setblocking(False)
    return WorkerHandle(worker, *await asyncio.open_connection(sock=worker.connection), allocator, threads)
