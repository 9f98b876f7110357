"""A worker at work, as the engine sees it on the event loop."""

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from service.engine import messages
from service.engine.backend import Pixels
from service.engine.batcher import ImageBatch
from service.engine.embeddings import Allocation, EmbeddingAllocator
from service.engine.launch import Worker
from service.engine.messages import (
    LoadAdapter,
    LoadFailed,
    LoadModel,
    ModelLoaded,
    Reply,
    RunBatch,
    UnloadAdapter,
    UnloadModel,
)
from service.errors import InvalidRequest, Unavailable

AHEAD = 2  # batches of a worker that have not left its network: one in it, one behind
SLOTS = AHEAD + 2  # those, one in the VAE and one before it


@dataclass(frozen=True)
class _Sent:
    """A batch that is not answered."""

    batch: ImageBatch
    slot: int
    time: float
    held: Sequence[Allocation | None]  # places of its prompts' embeddings


class WorkerHandle:
    """One worker: its models, its batches, its free slots, and when it was last heard of."""

    def __init__(
        self,
        worker: Worker,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        allocator: EmbeddingAllocator,
        threads: Executor,
    ) -> None:
        self.worker = worker
        self._reader = reader
        self._writer = writer
        self._allocator = allocator
        self._threads = threads
        self._models = {loaded.info.name: loaded for loaded in worker.ready.models}
        self._slots = list(range(SLOTS))
        self._batches: dict[int, _Sent] = {}  # oldest first
        self._ahead: set[int] = set()
        self._last_answer = 0.0
        self._loading: deque[tuple[LoadModel | LoadAdapter, asyncio.Future[ModelLoaded]]] = deque()  # oldest first

    @property
    def load(self) -> int:
        """Batches before its VAE."""
        return len(self._ahead)

    @property
    def free(self) -> bool:
        """Whether it takes one more batch."""
        return len(self._ahead) < AHEAD and bool(self._slots)

    def outstanding(self) -> list[ImageBatch]:
        """What it has not answered."""
        return [sent.batch for sent in self._batches.values()]

    def send(self, number: int, batch: ImageBatch, now: float) -> None:
        """Hand it a batch."""
        slot = self._slots.pop()
        for work in batch.work:
            work.begun = True
        prompts, seeds = [work.prompt for work in batch.work], [work.seed for work in batch.work]
        model, width, height, adapter, scale, steps = batch.key
        loaded = self._models[model]
        kind = loaded.info.digest, loaded.setup, loaded.text_bytes  # workers of one kind encode to the same bits
        held = [self._allocator.take((*kind, prompt), loaded.text_bytes) for prompt in prompts]
        self._batches[number] = _Sent(batch, slot, now, held)
        self._ahead.add(number)
        places = [each.place if each else None for each in held]
        run = RunBatch(number, model, prompts, places, seeds, width, height, slot, adapter, scale, steps)
        self._writer.write(messages.frame(run))

    def add(self, order: LoadModel | LoadAdapter) -> asyncio.Future[ModelLoaded]:
        """Let it load something. The future raises InvalidRequest when it cannot, Unavailable when it ends first."""
        waiting: asyncio.Future[ModelLoaded] = asyncio.get_running_loop().create_future()
        self._loading.append((order, waiting))
        self._writer.write(messages.frame(order))
        return waiting

    def remove(self, order: UnloadModel | UnloadAdapter) -> None:
        """Let it unload a model or an adapter."""
        self._writer.write(messages.frame(order))

    def loaded(self, reply: ModelLoaded | LoadFailed) -> None:
        """It has done what `add` asked for; what nobody waits for any more goes again."""
        order, waiting = self._loading.popleft()
        if isinstance(reply, ModelLoaded):
            self._models[reply.info.name] = reply
        match reply:
            case ModelLoaded() if waiting.cancelled():
                self.remove(inverse(order, reply))
            case ModelLoaded():
                waiting.set_result(reply)
            case LoadFailed() if not waiting.cancelled():
                waiting.set_exception(InvalidRequest(reply.reason, "folder", "model_not_loadable"))

    async def receive(self) -> Reply:
        """What it says next. Raises EOFError or OSError when it is gone."""
        header = await self._reader.readexactly(messages.HEADER_BYTES)
        return messages.read_reply(await self._reader.readexactly(messages.length(header)))

    def advanced(self, number: int) -> None:
        """A batch has left the network."""
        self._ahead.discard(number)

    def pixels(self, number: int) -> Pixels:
        """A copy of the images (B, H, W, 3) of a batch that is made. Safe from any thread.

        Raises EOFError or OSError if they are incomplete.
        """
        sent = self._batches[number]
        key = sent.batch.key
        return self.worker.read(sent.slot, (len(sent.batch.work), key.height, key.width, 3))

    def answered(self, number: int, now: float) -> tuple[ImageBatch, float, float]:
        """Forget a batch: it, when it was sent, and the seconds that the worker needed for it beyond the one before."""
        sent = self._batches.pop(number)
        self._slots.append(sent.slot)
        self._ahead.discard(number)
        self._let_go(sent)
        needed = now - max(sent.time, self._last_answer)
        self._last_answer = now
        return sent.batch, sent.time, needed

    def longest(self, now: float) -> float:
        """Seconds since its oldest batch could have begun."""
        return max((now - max(sent.time, self._last_answer) for sent in self._batches.values()), default=0.0)

    async def leave(self) -> None:
        """Hang up, and end the worker."""
        for _, waiting in self._loading:
            if not waiting.cancelled():
                waiting.set_exception(Unavailable("a worker ended while it loaded the model; try again"))
        self._loading.clear()
        self._writer.transport.abort()
        await asyncio.get_running_loop().run_in_executor(self._threads, self.worker.end)
        for sent in self._batches.values():  # a process that is dead writes no more
            self._let_go(sent)
        self._batches.clear()

    @staticmethod
    def _let_go(sent: _Sent) -> None:
        for held in sent.held:
            if held is not None:
                held.batches -= 1


def inverse(order: LoadModel | LoadAdapter, answer: ModelLoaded) -> UnloadModel | UnloadAdapter:
    """What undoes an order that was carried out."""
    return UnloadModel(answer.info.name) if isinstance(order, LoadModel) else UnloadAdapter(order.model, order.name)


async def connect(worker: Worker, allocator: EmbeddingAllocator, threads: Executor) -> WorkerHandle:
    """A worker that is ready, on the event loop; `threads` are for calls that block."""
    worker.connection.setblocking(False)
    return WorkerHandle(worker, *await asyncio.open_connection(sock=worker.connection), allocator, threads)
