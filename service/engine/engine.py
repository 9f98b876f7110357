"""Admission, batches, workers, and replies.

Every worker has one batch in its network and one waiting ready behind it, so that a device never idles between two;
everything else stays in the batcher, where it can still be grouped better or dropped. What is accepted is answered: a
batch that fails is halved until the work at fault stands alone, and a worker that dies or goes silent is replaced
while its batches run again elsewhere. Since an image depends on its prompt and seed alone, they come out the same.
"""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.engine import messages
from service.engine.backend import Card, Pixels
from service.engine.batcher import Batch, Batcher, Key, Priority, Work
from service.engine.cache import Cache
from service.engine.launch import Fleet, Launch, Worker
from service.engine.messages import Advanced, Beat, Failed, Made, Reply, Run
from service.errors import GenerationFailed, Overloaded, StartError, TimedOut, Unavailable
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)

AHEAD = 2  # batches of a worker that have not left its network: one in it, one behind
SLOTS = AHEAD + 2  # those, one in the VAE and one before it
LONE_DEATHS = 5  # workers that may die while an image is their oldest and alone; then it is at fault
LONGEST_PAUSE = 30.0  # seconds between two attempts to start a worker


@dataclass(frozen=True)
class Image:
    """One image, and what is to be said of it. Read-only: a cache may give it to several."""

    pixels: NDArray[np.uint8]  # (H, W, 3)
    tokens: int  # of the prompt, as the model saw it
    truncated: bool  # whether the model saw only the prompt's beginning
    seconds: Mapping[str, float]  # queue, and the stages of its batch: text, model, vae


_Pixels = tuple[str, str, int, int, int]  # all that determines them: the model's digest, prompt, seed, size


class _Seat:
    """One worker at work: its batches, its free slots, and when it was last heard of."""

    def __init__(self, worker: Worker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.worker = worker
        self._reader = reader
        self._writer = writer
        self._slots = list(range(SLOTS))
        self._batches: dict[int, tuple[Batch, int, float]] = {}  # with slot and time of sending, oldest first
        self._ahead: set[int] = set()
        self._last_answer = 0.0

    @property
    def load(self) -> int:
        """Batches before its VAE."""
        return len(self._ahead)

    @property
    def free(self) -> bool:
        """Whether it takes one more batch."""
        return len(self._ahead) < AHEAD and bool(self._slots)

    def outstanding(self) -> list[Batch]:
        """What it has not answered."""
        return [batch for batch, _, _ in self._batches.values()]

    def send(self, number: int, batch: Batch, now: float) -> None:
        """Hand it a batch."""
        slot = self._slots.pop()
        self._batches[number] = batch, slot, now
        self._ahead.add(number)
        prompts, seeds = [work.prompt for work in batch.work], [work.seed for work in batch.work]
        model, width, height = batch.key
        self._writer.write(messages.frame(Run(number, model, prompts, seeds, width, height, slot)))

    async def receive(self) -> Reply:
        """What it says next. Raises EOFError or OSError when it is gone."""
        header = await self._reader.readexactly(messages.HEADER_BYTES)
        return messages.read_reply(await self._reader.readexactly(messages.length(header)))

    def advanced(self, number: int) -> None:
        """A batch has left the network."""
        self._ahead.discard(number)

    def pixels(self, number: int) -> Pixels:
        """A copy of the images (B, H, W, 3) of a batch that is made. Safe from any thread."""
        batch, slot, _ = self._batches[number]
        return self.worker.read(slot, (len(batch.work), batch.key.height, batch.key.width, 3))

    def answered(self, number: int, now: float) -> tuple[Batch, float, float]:
        """Forget a batch: it, when it was sent, and the seconds that the worker needed for it beyond the one before."""
        batch, slot, sent = self._batches.pop(number)
        self._slots.append(slot)
        self._ahead.discard(number)
        needed = now - max(sent, self._last_answer)
        self._last_answer = now
        return batch, sent, needed

    def longest(self, now: float) -> float:
        """Seconds since its oldest batch could have begun."""
        return max((now - max(sent, self._last_answer) for _, _, sent in self._batches.values()), default=0.0)

    async def leave(self) -> None:
        """Hang up, and end the worker."""
        self._writer.transport.abort()
        await asyncio.to_thread(self.worker.end)


class Engine:
    """Takes work in on the event loop and answers it from the workers."""

    def __init__(self, fleet: Fleet, settings: Settings, metrics: Metrics) -> None:
        self.cards: Mapping[str, Card] = {}  # by model, the default one first; there once it has started
        self._fleet = fleet
        self._settings = settings
        self._metrics = metrics
        self._batcher = Batcher(0, 0, 0, {})  # the real one needs the models' blocks
        self._seconds: dict[Key, float] = {}  # of a worker for one image of a whole block: a running mean
        self._seats: list[_Seat] = []
        self._supervisors: list[asyncio.Task[None]] = []
        self._making: dict[_Pixels, Work] = {}
        self._made: Cache[_Pixels, Image] = Cache(settings.result_cache_bytes)
        self._numbers = itertools.count()
        self._lingering: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._draining = False

    @property
    def open(self) -> bool:
        """Whether new work is taken: also while a worker is being replaced, since what waits for it is bounded."""
        return bool(self.cards) and not self._draining

    @property
    def ready(self) -> bool:
        """Whether new work is taken and there is a worker for it."""
        return self.open and bool(self._seats)

    @property
    def processes(self) -> list[int]:
        """Ids of the worker processes that are ready."""
        return [seat.worker.process.pid for seat in self._seats if seat.worker.process is not None]

    async def start(self) -> None:
        """Wait for every worker. Raises StartError when one cannot start."""
        workers = await asyncio.to_thread(self._fleet.start)
        ready = workers[0].ready
        self.cards = {card.name: card for card in ready.cards}
        self._seconds = {Key(t.model, t.width, t.height): t.seconds for t in ready.timings}
        rows = {card.name: card.rows for card in ready.cards}
        own = self._settings
        owner_limit = own.queue_limit_per_key or own.queue_limit
        self._batcher = Batcher(own.max_batch, own.queue_limit, owner_limit, rows, own.linger_seconds)
        for launch, worker in zip(self._fleet.launches, workers, strict=True):
            seat = await self._seat(worker)
            self._supervisors.append(asyncio.create_task(self._supervise(launch, seat)))

    async def generate(
        self,
        model: str,
        prompt: str,
        seeds: Sequence[int],
        width: int,
        height: int,
        *,
        owner: str = "",
        priority: Priority = Priority.INTERACTIVE,
        timeout: float | None = None,
    ) -> list[Image]:
        """One image per seed. Cancelling the call drops what still waits and nobody else wants.

        `owner` is whose turn and whose bound it counts for; `timeout` in seconds, None is the server's. Raises
        Overloaded without queueing anything when the queue is full or the images could not be there in time, TimedOut
        when they were not, GenerationFailed for what the model failed on.
        """
        if not self.open:
            raise Unavailable("the server is starting or shutting down; ask another one")
        timeout = self._settings.timeout_seconds if timeout is None else timeout
        key = Key(model, width, height)
        replies: dict[int, asyncio.Future[Image]] = {}
        wanted: list[Work] = []
        new: list[int] = []
        for seed in dict.fromkeys(seeds):
            same = (self.cards[model].digest, prompt, seed, width, height)
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
        if new:
            self._admit(key, len(new), owner, priority, timeout)
        for work in wanted:
            work.wanted += 1
        for seed in new:
            reply: asyncio.Future[Image] = asyncio.get_running_loop().create_future()
            work = Work(key, prompt, seed, reply, owner, priority)
            self._batcher.add(work, time.monotonic())
            self._making[self._pixels(work)] = work
            wanted.append(work)
            replies[seed] = reply
        self._dispatch()
        try:
            await asyncio.wait(replies.values(), timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
            for reply in replies.values():
                if reply.done():
                    reply.result()  # raises what the model failed on
            if not all(reply.done() for reply in replies.values()):
                raise TimedOut(f"the images were not made within {timeout:g} s")
            return [replies[seed].result() for seed in seeds]
        finally:
            self._release(wanted)

    async def drain(self) -> None:
        """Refuse new work, finish what was accepted, and end the workers."""
        self._draining = True
        if self._seats or len(self._batcher):
            self._check_idle()
            await self._idle.wait()
        for supervisor in self._supervisors:
            supervisor.cancel()
        if self._supervisors:
            await asyncio.wait(self._supervisors)
        await asyncio.gather(*(seat.leave() for seat in self._seats))
        self._seats.clear()

    def _admit(self, key: Key, images: int, owner: str, priority: Priority, timeout: float) -> None:
        """Raise Overloaded with the time after which so many images would be taken."""
        workers = max(1, len(self._seats))
        if excess := self._batcher.missing_room(images, owner):
            self._refuse("queue_full", f"{len(self._batcher)} images wait already", self._cost(key, excess) / workers)
        ahead = self._batcher.ahead_of(priority)
        for batch in itertools.chain.from_iterable(seat.outstanding() for seat in self._seats):
            ahead[batch.key] = ahead.get(batch.key, 0) + len(batch.work)
        if not ahead:
            return  # on an empty server, what is tried is what teaches the engine better
        ahead[key] = ahead.get(key, 0) + images
        needed = sum(self._cost(*some) for some in ahead.items()) / workers
        if needed > timeout:
            self._refuse("deadline", f"the images would take {needed:.1f} s, not {timeout:g} s", needed - timeout)

    def _cost(self, key: Key, images: int) -> float:
        """Seconds that a worker needs for so many images, in whole blocks."""
        return self._padded(key, images) * self._seconds[key]

    def _padded(self, key: Key, images: int) -> int:
        rows = self.cards[key.model].rows
        return math.ceil(images / rows) * rows

    def _refuse(self, reason: str, sentence: str, seconds: float) -> None:
        self._metrics.refusals.labels(reason).inc()
        wait = max(1, math.ceil(seconds))
        raise Overloaded(f"{sentence}; try again in {wait} s", wait)

    def _pixels(self, work: Work) -> _Pixels:
        model, width, height = work.key
        return self.cards[model].digest, work.prompt, work.seed, width, height

    def _release(self, wanted: Sequence[Work]) -> None:
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

    def _forget(self, work: Work) -> None:
        """Nobody can join this work any more."""
        if self._making.get(self._pixels(work)) is work:
            del self._making[self._pixels(work)]

    def _dispatch(self) -> None:
        """Give the workers what they have room for, the idlest first."""
        while free := [seat for seat in self._seats if seat.free]:
            seat = min(free, key=lambda seat: seat.load)
            now = time.monotonic()
            batch = self._batcher.take(now, idle=seat.load == 0)
            if batch is None:
                if len(self._batcher) and seat.load == 0 and self._lingering is None:
                    delay = self._settings.linger_seconds
                    self._lingering = asyncio.get_running_loop().call_later(delay, self._stop_lingering)
                break
            self._metrics.closed.labels(batch.reason).inc()
            seat.send(next(self._numbers), batch, now)
        self._metrics.queue.set(len(self._batcher))
        self._check_idle()

    def _stop_lingering(self) -> None:
        self._lingering = None
        self._dispatch()

    def _check_idle(self) -> None:
        if self._draining and not len(self._batcher) and not any(seat.outstanding() for seat in self._seats):
            self._idle.set()

    async def _seat(self, worker: Worker) -> _Seat:
        """Give a worker a seat and work."""
        worker.connection.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=worker.connection)
        seat = _Seat(worker, reader, writer)
        self._seats.append(seat)
        self._metrics.workers.set(len(self._seats))
        self._dispatch()
        return seat

    async def _supervise(self, launch: Launch, seat: _Seat) -> None:
        """Listen to a worker; when it is gone, give its batches to others and start another one in its place."""
        while True:
            reason = await self._listen(seat)
            lost = seat.outstanding()
            log.error("the worker on %s %s; its %d batches run again", seat.worker.name, reason, len(lost))
            self._metrics.restarts.labels(reason).inc()
            self._seats.remove(seat)
            self._metrics.workers.set(len(self._seats))
            for batch in lost:
                self._again(batch, suspect=batch is lost[0])
            self._dispatch()
            await seat.leave()
            seat = await self._seat(await self._relaunch(launch))

    async def _relaunch(self, launch: Launch) -> Worker:
        """Start a worker, with longer pauses between attempts that fail."""
        pause = 1.0
        while True:
            starting = asyncio.get_running_loop().run_in_executor(None, launch)
            try:
                return await asyncio.shield(starting)
            except asyncio.CancelledError:
                starting.add_done_callback(_end)
                raise
            except StartError as error:
                log.error("a worker could not be started again; next try in %.0f s: %s", pause, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _listen(self, seat: _Seat) -> str:
        """Take a worker's replies until it dies, goes silent or hangs, and say which."""
        while True:
            try:
                async with asyncio.timeout(self._settings.worker_silence_seconds):
                    reply = await seat.receive()
            except TimeoutError:
                return "silent"
            except (EOFError, OSError):
                return "died"
            match reply:
                case Beat():
                    self._metrics.device_memory.labels(seat.worker.name).set(reply.memory_bytes)
                case Advanced():
                    seat.advanced(reply.batch)
                case Made():
                    await self._answer(seat, reply)
                case Failed():
                    self._failed(seat, reply)
            self._dispatch()
            if seat.longest(time.monotonic()) > self._settings.batch_timeout_seconds:
                return "hung"

    async def _answer(self, seat: _Seat, made: Made) -> None:
        """Fetch a batch's pixels and give each image to those who wait for it."""
        pixels = await asyncio.to_thread(seat.pixels, made.batch)
        pixels.flags.writeable = False
        batch, sent, needed = seat.answered(made.batch, time.monotonic())
        each = needed / self._padded(batch.key, len(batch.work))
        self._seconds[batch.key] += 0.2 * (each - self._seconds[batch.key])
        self._metrics.batch_size.observe(len(batch.work))
        self._metrics.images.labels(batch.key.model).inc(len(batch.work))
        self._metrics.cache_hits.labels("prompt").inc(made.prompt_hits)
        for stage, seconds in made.seconds.items():
            self._metrics.stages.labels(stage).observe(seconds)
        for i, work in enumerate(batch.work):
            queued = sent - work.arrived
            self._metrics.stages.labels("queue").observe(queued)
            image = Image(pixels[i], made.tokens[i], made.truncated[i], {"queue": queued, **made.seconds})
            self._forget(work)
            self._made.put(self._pixels(work), image, image.pixels.nbytes)
            if not work.reply.done():  # its clients left meanwhile
                work.reply.set_result(image)

    def _failed(self, seat: _Seat, failed: Failed) -> None:
        """Halve a batch that failed; work that failed alone is at fault."""
        batch, _, _ = seat.answered(failed.batch, time.monotonic())
        self._metrics.failures.labels(batch.key.model).inc()
        if failed.fault == "memory":
            self._batcher.lower_cap(batch.key, len(batch.work) // 2)
        if len(batch.work) > 1:
            self._retry(batch)
        else:
            self._give_up(batch.work[0])

    def _again(self, batch: Batch, suspect: bool) -> None:
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

    def _retry(self, batch: Batch) -> None:
        for half in batch.halves():
            self._batcher.retry(half)
        self._metrics.dropped.inc(self._batcher.drop_cancelled())

    def _give_up(self, work: Work) -> None:
        self._forget(work)
        if not work.reply.done():
            work.reply.set_exception(GenerationFailed("the model failed on this image; try another seed"))


def _end(starting: asyncio.Future[Worker]) -> None:
    """End a worker that became ready after nobody wanted it any more."""
    if not starting.cancelled() and starting.exception() is None:
        starting.result().end()
