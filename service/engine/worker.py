"""The worker: one device's process. Batches come over a socket, pixels and embeddings go through shared memory.

Three threads hand batches on, so that the text encoders, the network and the VAE each work on another batch; a fourth
loads and unloads models beside them. A batch that raises is reported and forgotten; the server decides what is tried
again. The worker ends when the server hangs up, and is never asked to end in any other way.

    python -m service.engine.worker SOCKET PIXELS EMBEDDINGS '{"device": "cpu", ...}'
"""

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Queue
from typing import Any

import msgspec
import numpy as np

from service.engine.backend import Backend, DeviceLost, EncodedPrompts, Timing
from service.engine.embeddings import SharedEmbeddings
from service.engine.messages import (
    BatchDone,
    BatchFailed,
    Channel,
    Heartbeat,
    LoadAdapter,
    LoadFailed,
    LoadModel,
    ModelLoaded,
    NetworkDone,
    Profiling,
    Ready,
    RunBatch,
    StartFailed,
    UnloadAdapter,
    UnloadModel,
    WorkerConfig,
)
from service.engine.profile import measure, read_profile, recall
from service.engine.shared_memory import write
from service.engine.simulator import Simulator
from service.errors import StartError
from service.signals import EXIT_SIGNALS

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
SLOT_BYTES = 1 << 32  # from one slot to the next; the file has holes, so that only what is written takes memory


@dataclass
class _Job:
    """A batch on its way through the stages."""

    run: RunBatch
    backend: Backend
    text: EncodedPrompts | None = None
    value: Any = None  # conditions, then latents
    seconds: dict[str, float] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)  # by stage, as `seconds`


_Jobs = Queue[_Job | None]  # None: the server has hung up
_Change = LoadModel | UnloadModel | LoadAdapter | UnloadAdapter
_Changes = Queue[_Change | None]
ModelLoader = Callable[[LoadModel], Backend]  # raises StartError
Timer = Callable[[Backend], Sequence[Timing]]  # runs every size of a model; raises StartError


def warm_up(backend: Backend) -> Sequence[Timing]:
    """Run a block of every size, and time it."""
    return measure(backend, (), repeats=1)


@dataclass(frozen=True)
class Memory:
    """Descriptors of the memory that a worker shares."""

    pixels: int  # with the server
    embeddings: int  # with the server's other workers


def serve(
    channel: Channel, memory: Memory, models: Sequence[LoadModel], load: ModelLoader, clock: Timer = warm_up
) -> None:
    """Load the models, run and time each, then make what is asked for until the server hangs up."""
    backends: dict[str, Backend] = {}
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(channel, backends, ended), name="beat", daemon=True)
    beats.start()
    try:
        channel.send(Ready([_add(backends, order, load, clock) for order in models]))
        _work(channel, memory, backends, load, clock)
    except StartError as error:
        channel.send(StartFailed(str(error)))
    except OSError:
        log.info("the server is gone")
    finally:
        ended.set()
        beats.join()


def _add(backends: dict[str, Backend], order: LoadModel, load: ModelLoader, clock: Timer) -> ModelLoaded:
    """Load a model and run it, then take it among the others. Raises StartError when that fails."""
    backend = load(order)
    name = backend.info.name
    if name in backends:
        message = f"{order.folder}: a model named {name!r} is loaded already; unload it, or give this one another name"
        raise StartError(message)
    timings = clock(backend)
    for adapter, folder in order.adapters.items():
        backend.add_adapter(adapter, folder)
    backends[name] = backend
    return _loaded(backend, timings)


def _loaded(backend: Backend, timings: Sequence[Timing] = ()) -> ModelLoaded:
    return ModelLoaded(backend.info, backend.environment, backend.text_bytes, timings)


def _beat(channel: Channel, backends: Mapping[str, Backend], ended: threading.Event) -> None:
    """Say every second that the process lives."""
    while not ended.wait(BEAT_SECONDS):
        try:
            channel.send(Heartbeat(max((backend.memory_bytes() for backend in list(backends.values())), default=0)))
        except OSError:
            return


def _work(channel: Channel, memory: Memory, backends: dict[str, Backend], load: ModelLoader, clock: Timer) -> None:
    """Read batches and pass them through the stages; a stage waits for the next one to be free."""

    def text(job: _Job) -> None:
        places = zip(job.run.prompts, job.run.embedding_slots, strict=True)
        shared = SharedEmbeddings(memory.embeddings, {prompt: place for prompt, place in places if place})
        job.text = job.backend.encode(job.run.prompts, shared)
        job.value = job.text.conditions

    def model(job: _Job) -> None:
        job.backend.adapt(job.run.adapter, job.run.scale)
        job.value = job.backend.denoise(job.value, job.run.seeds, job.run.width, job.run.height, job.run.steps)

    def vae(job: _Job) -> None:
        pixels = np.ascontiguousarray(job.backend.decode(job.value))
        expected = len(job.run.seeds), job.run.height, job.run.width, 3
        if pixels.shape != expected or pixels.dtype != np.uint8:
            raise ValueError(f"the model gave {pixels.dtype} of shape {pixels.shape}, not uint8 of {expected}")
        if pixels.nbytes > SLOT_BYTES:
            raise MemoryError(f"the pixels are {pixels.nbytes} bytes; a slot holds {SLOT_BYTES}")
        try:
            write(memory.pixels, pixels.data.cast("B"), job.run.pixel_slot * SLOT_BYTES)
        except OSError as error:  # smaller batches may fit
            raise MemoryError(f"the shared memory does not take {pixels.nbytes} bytes: {error}") from error

    def advance(job: _Job) -> None:
        channel.send(NetworkDone(job.run.batch))
        decoding.put(job)

    def answer(job: _Job) -> None:
        assert job.text is not None
        text = job.text
        channel.send(BatchDone(job.run.batch, text.tokens, text.truncated, job.seconds, job.began, text.hits))

    encoding, denoising, decoding = _Jobs(1), _Jobs(1), _Jobs(1)
    stages = [
        threading.Thread(target=_stage, args=(channel, *stage), name=stage[0].__name__, daemon=True)
        for stage in ((text, encoding, denoising.put), (model, denoising, advance), (vae, decoding, answer))
    ]
    changes = _Changes()
    threading.Thread(target=_change, args=(channel, backends, load, clock, changes), name="models", daemon=True).start()
    for stage in stages:
        stage.start()
    while (order := channel.next_order()) is not None:
        match order:
            case RunBatch():
                encoding.put(_Job(order, backends[order.model]))
            case _:
                changes.put(order)
    changes.put(None)  # nobody waits for what still loads
    for jobs, stage in zip((encoding, denoising, decoding), stages, strict=True):
        jobs.put(None)
        stage.join()


def _change(channel: Channel, backends: dict[str, Backend], load: ModelLoader, clock: Timer, changes: _Changes) -> None:
    """The thread that loads and unloads, one model after the other."""
    while (order := changes.get()) is not None:
        match order:
            case LoadModel():
                try:
                    answer: ModelLoaded | LoadFailed = _add(backends, order, load, clock)
                except StartError as error:
                    answer = LoadFailed(str(error))
                _tell(channel.send, answer)
            case UnloadModel():
                backends.pop(order.name).close()
            case LoadAdapter():
                backend = backends[order.model]
                try:
                    backend.add_adapter(order.name, order.folder)
                    answer = _loaded(backend)
                except StartError as error:
                    answer = LoadFailed(str(error))
                _tell(channel.send, answer)
            case UnloadAdapter():
                backends[order.model].remove_adapter(order.name)


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
            _tell(channel.send, BatchFailed(job.run.batch, "memory" if isinstance(error, MemoryError) else "error"))
        else:
            job.seconds[step.__name__] = time.monotonic() - began
            job.began[step.__name__] = began
            _tell(hand_on, job)


def _tell(say: Callable[[Any], None], what: Any) -> None:
    """Say something to a server that may be gone: the reading thread finds that out and ends the worker."""
    try:
        say(what)
    except OSError:
        log.info("the server is gone")


def loader(start: WorkerConfig) -> ModelLoader:
    """What loads models on a device; torch is imported with the first."""

    def load(order: LoadModel) -> Backend:
        return _simulate(order, start.simulated_profile) if start.device == "simulator" else _student(order, start)

    return load


def clock_of(profiling: Profiling) -> Timer:
    """What times a model: a folder that may know it, or the model itself."""
    timed, warm_up = profiling.timed_batches, profiling.warm_up_batches

    def clock(backend: Backend) -> Sequence[Timing]:
        if profiling.folder:
            return recall(backend, timed, Path(profiling.folder), warm_up)
        return measure(backend, (*timed, *warm_up), repeats=1)

    return clock


def _student(order: LoadModel, start: WorkerConfig) -> Backend:
    if order.folder is not None and not Path(order.folder).is_dir():  # said before seconds of imports
        raise StartError(f"model {order.folder}: there is no such folder; give the folder of a student")
    from service.engine.model_loader import load_backend

    return load_backend(order.folder, order.name, start.device, start.runtime)


def _simulate(order: LoadModel, profile_path: str | None) -> Backend:
    """A simulator that stands for the student of a folder, or for the model of a profile and its times."""
    simulator = Simulator()
    if profile_path:
        profile = read_profile(Path(profile_path))
        simulator = Simulator(info=profile.info, timings=profile.timings)
    if order.folder is not None:
        try:
            name = str(json.loads((Path(order.folder) / "onestep.json").read_text(encoding="utf-8"))["name"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StartError(f"{order.folder} is no student folder: {error}") from None
        simulator.info = replace(simulator.info, name=order.name or name, digest=f"simulator of {order.folder}")
    return simulator


def main() -> None:
    """Entry point of the process."""
    for number in EXIT_SIGNALS:  # the terminal sends them to the whole group; the server first finishes its work
        signal.signal(number, signal.SIG_IGN)
    descriptor, pixels, embeddings, start = sys.argv[1:]
    channel = Channel(socket.socket(fileno=int(descriptor)))
    told = msgspec.json.decode(start, type=WorkerConfig)
    memory = Memory(int(pixels), int(embeddings))
    serve(channel, memory, told.models, loader(told), clock_of(told.profiling))
    os._exit(0)  # a thread may still be in the device; nothing is left to tidy up


if __name__ == "__main__":
    main()
