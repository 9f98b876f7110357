"""The worker: one device's process. Batches come over a socket, pixels go through shared memory.

Three threads hand batches on, so that the text encoders, the network and the VAE each work on another batch. A batch
that raises is reported and forgotten; the server decides what is tried again. The worker ends when the server hangs
up, and is never asked to end in any other way.

    python -m service.engine.worker SOCKET MEMORY '{"device": "cpu", ...}'
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import msgspec
import numpy as np

from service.engine.backend import Backend, DeviceLost, Simulator, Text
from service.engine.messages import Advanced, Beat, Channel, Failed, Made, Ready, Refused, Run, Start, Timing
from service.errors import StartError

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
SLOT_BYTES = 1 << 32  # from one slot to the next; the file has holes, so that only what is written takes memory


@dataclass
class _Job:
    """A batch on its way through the stages."""

    run: Run
    backend: Backend
    text: Text | None = None
    value: Any = None  # conditions, then latents
    seconds: dict[str, float] = field(default_factory=dict)


_Jobs = Queue[_Job | None]  # None: the server has hung up


def serve(channel: Channel, memory: int, load: Callable[[], Mapping[str, Backend]]) -> None:
    """Load the models, run each once, then make what is asked for until the server hangs up."""
    backends: dict[str, Backend] = {}
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(channel, backends, ended), name="beat", daemon=True)
    beats.start()
    try:
        backends.update(load())
        timings = [timing for backend in backends.values() for timing in warm_up(backend)]
        channel.send(Ready([backend.card for backend in backends.values()], timings))
        _work(channel, memory, backends)
    except StartError as error:
        channel.send(Refused(str(error)))
    except OSError:
        log.info("the server is gone")
    finally:
        ended.set()
        beats.join()


def warm_up(backend: Backend) -> list[Timing]:
    """Run the real path of every size twice, a whole block each: the first run pays for what is made once.

    Raises StartError when a run fails.
    """
    timings = []
    rows = backend.card.rows
    for width, height in backend.card.sizes:
        for _ in range(2):
            began = time.monotonic()
            try:
                text = backend.encode([""] * rows)
                backend.decode(backend.denoise(text.conditions, range(rows), width, height))
            except Exception as error:
                raise StartError(f"{backend.card.name} fails at {width}x{height}: {error}") from error
        timings.append(Timing(backend.card.name, width, height, (time.monotonic() - began) / rows))
    return timings


def _beat(channel: Channel, backends: Mapping[str, Backend], ended: threading.Event) -> None:
    """Say every second that the process lives."""
    while not ended.wait(BEAT_SECONDS):
        try:
            channel.send(Beat(max((backend.memory_bytes() for backend in list(backends.values())), default=0)))
        except OSError:
            return


def _work(channel: Channel, memory: int, backends: Mapping[str, Backend]) -> None:
    """Read batches and pass them through the stages; a stage waits for the next one to be free."""

    def text(job: _Job) -> None:
        job.text = job.backend.encode(job.run.prompts)
        job.value = job.text.conditions

    def model(job: _Job) -> None:
        job.value = job.backend.denoise(job.value, job.run.seeds, job.run.width, job.run.height)

    def vae(job: _Job) -> None:
        pixels = np.ascontiguousarray(job.backend.decode(job.value))
        os.pwrite(memory, pixels.data.cast("B"), job.run.slot * SLOT_BYTES)

    def advance(job: _Job) -> None:
        channel.send(Advanced(job.run.batch))
        decoding.put(job)

    def answer(job: _Job) -> None:
        assert job.text is not None
        text = job.text
        channel.send(Made(job.run.batch, text.tokens, text.truncated, job.seconds, text.hits))

    encoding, denoising, decoding = _Jobs(1), _Jobs(1), _Jobs(1)
    stages = [
        threading.Thread(target=_stage, args=(channel, *stage), name=stage[0].__name__, daemon=True)
        for stage in ((text, encoding, denoising.put), (model, denoising, advance), (vae, decoding, answer))
    ]
    for stage in stages:
        stage.start()
    while (run := channel.next_run()) is not None:
        encoding.put(_Job(run, backends[run.model]))
    for jobs, stage in zip((encoding, denoising, decoding), stages, strict=True):
        jobs.put(None)
        stage.join()


def _stage(channel: Channel, step: Callable[[_Job], None], jobs: _Jobs, hand_on: Callable[[_Job], None]) -> None:
    """One stage's thread: take a batch, do the step, hand it on."""
    while (job := jobs.get()) is not None:
        began = time.monotonic()
        try:
            step(job)
        except DeviceLost:
            log.exception("the device of this worker is lost")
            channel.close()  # the server starts another worker and gives it what this one had
        except Exception as error:
            log.exception("a batch of %d images failed in %s", len(job.run.seeds), step.__name__)
            _tell(channel.send, Failed(job.run.batch, "memory" if isinstance(error, MemoryError) else "error"))
        else:
            job.seconds[step.__name__] = time.monotonic() - began
            _tell(hand_on, job)


def _tell(say: Callable[[Any], None], what: Any) -> None:
    """Say something to a server that may be gone: the reading thread finds that out and ends the worker."""
    try:
        say(what)
    except OSError:
        log.info("the server is gone")


def _load(start: Start) -> Mapping[str, Backend]:
    """What the command line names; torch is imported for models only."""
    if start.device == "simulator":
        simulator = Simulator()
        return {simulator.card.name: simulator}
    from service.registry import load_backends

    return load_backends(start.models, start.device, start.prompt_cache_bytes)


def main() -> None:
    """Entry point of the process."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the server finishes its work first
        signal.signal(number, signal.SIG_IGN)
    descriptor, memory, start = sys.argv[1:]
    channel = Channel(socket.socket(fileno=int(descriptor)))
    serve(channel, int(memory), lambda: _load(msgspec.json.decode(start, type=Start)))
    os._exit(0)  # a thread may still be in the device; nothing is left to tidy up


if __name__ == "__main__":
    main()
