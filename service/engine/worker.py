"""The worker: one device's process. It receives commands over a socket; pixels and embeddings are in shared memory.

Three threads pass batches on, so that the text encoders, the network and the VAE each work on a different batch; a
fourth loads and unloads models. A batch that raises is reported and forgotten; the server decides what is retried. The
process ends as soon as the server closes the connection or dies, also while a model is loaded or measured.

    python -m service.engine.worker SOCKET PIXELS EMBEDDINGS '{"device": "cpu", ...}'
"""

import gc
import json
import logging
import os
import select
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
    Unload,
    WorkerConfig,
)
from service.engine.profile import measure, read_profile, recall
from service.engine.shared_memory import write
from service.engine.simulator import Simulator
from service.errors import StartError
from service.observability.logs import configure
from service.signals import EXIT_SIGNALS

log = logging.getLogger("service.engine.worker")  # this module is run as __main__

BEAT_SECONDS = 1.0
LOADING_NICE = 10  # nice value of the thread that loads models, and measures them, beside the stages of others
SLOT_BYTES = 1 << 32  # from one slot to the next; only what is written takes memory


@dataclass
class _Job:
    """A batch in progress."""

    run: RunBatch
    backend: Backend
    text: EncodedPrompts | None = None
    value: Any = None  # conditions and noise, then latents
    seconds: dict[str, float] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)  # by stage, as `seconds`


_Jobs = Queue[_Job | None]  # None: the server has hung up
_Change = LoadModel | LoadAdapter | Unload
_Changes = Queue[_Change | None]
ModelLoader = Callable[[LoadModel], Backend]  # raises StartError
Timer = Callable[[Backend], Sequence[Timing]]  # runs every size of a model; raises StartError


@dataclass(frozen=True)
class Memory:
    """Descriptors of the memory that a worker shares."""

    pixels: int  # with the server
    embeddings: int  # with the server's other workers


def serve(channel: Channel, memory: Memory, models: Sequence[LoadModel], load: ModelLoader, timer: Timer) -> None:
    """Load, run and time the models, then execute commands until the server closes the connection."""
    backends: dict[str, Backend] = {}
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(channel, backends, ended), name="beat", daemon=True)
    beats.start()
    try:
        channel.send(Ready([_add(backends, command, load, timer) for command in models]))
        _work(channel, memory, backends, load, timer)
    except StartError as error:
        channel.send(LoadFailed(str(error)))
    except OSError:
        log.debug("the server is gone")
    finally:
        ended.set()
        beats.join()


def _add(backends: dict[str, Backend], command: LoadModel, load: ModelLoader, timer: Timer) -> ModelLoaded:
    """Load a model, run it, and add it to the others. Raises StartError when that fails."""
    backend = load(command)
    name = backend.info.name
    if name in backends:
        message = (
            f"{command.folder}: a model named {name!r} is loaded already; unload it, or give this one another name"
        )
        raise StartError(message)
    timings = timer(backend)
    for adapter, path in command.adapters.items():
        backend.add_adapter(adapter, path)
    backends[name] = backend
    return _loaded(backend, timings)


def _loaded(backend: Backend, timings: Sequence[Timing] = ()) -> ModelLoaded:
    return ModelLoaded(backend.info, backend.environment, backend.text_bytes, timings)


def _beat(channel: Channel, backends: Mapping[str, Backend], ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        try:
            channel.send(Heartbeat(max((backend.memory_bytes() for backend in list(backends.values())), default=0)))
        except OSError:
            return


def _work(channel: Channel, memory: Memory, backends: dict[str, Backend], load: ModelLoader, timer: Timer) -> None:
    """Read commands and pass batches through the stages. A stage waits until the next one is free."""

    def text(job: _Job) -> None:
        places = zip(job.run.prompts, job.run.embedding_slots, strict=True)
        shared = SharedEmbeddings(memory.embeddings, {prompt: place for prompt, place in places if place})
        job.text = job.backend.encode(job.run.prompts, shared)
        key = job.run.key
        job.value = job.text.conditions, job.backend.noise(job.run.seeds, key.width, key.height)

    def model(job: _Job) -> None:
        key = job.run.key
        job.backend.adapt(key.adapter, key.scale)
        conditions, noise = job.value
        job.value = job.backend.denoise(conditions, noise, key.steps)

    def vae(job: _Job) -> None:
        pixels = np.ascontiguousarray(job.backend.decode(job.value))
        expected = len(job.run.seeds), job.run.key.height, job.run.key.width, 3
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
    threading.Thread(target=_change, args=(channel, backends, load, timer, changes), name="models", daemon=True).start()
    for stage in stages:
        stage.start()
    while (command := channel.next_command()) is not None:
        match command:
            case RunBatch():
                encoding.put(_Job(command, backends[command.key.model]))
            case _:
                changes.put(command)
    changes.put(None)  # models that are still loading are not needed any more
    for jobs, stage in zip((encoding, denoising, decoding), stages, strict=True):
        jobs.put(None)
        stage.join()


def _change(channel: Channel, backends: dict[str, Backend], load: ModelLoader, timer: Timer, changes: _Changes) -> None:
    """Load and unload, one model after the other. Runs in its own thread, which leaves the cores to the stages."""
    if sys.platform == "linux":  # elsewhere a priority is that of the whole process
        thread = threading.get_native_id()
        # Never below the value of the process, which only root may lower.
        os.setpriority(os.PRIO_PROCESS, thread, max(LOADING_NICE, os.getpriority(os.PRIO_PROCESS, thread)))
    while (command := changes.get()) is not None:
        match command:
            case LoadModel():
                try:
                    answer: ModelLoaded | LoadFailed = _add(backends, command, load, timer)
                except StartError as error:
                    answer = LoadFailed(str(error))
                _send(channel.send, answer)
            case LoadAdapter():
                backend = backends[command.model]
                try:
                    backend.add_adapter(command.name, command.path)
                    answer = _loaded(backend)
                except StartError as error:
                    answer = LoadFailed(str(error))
                _send(channel.send, answer)
            case Unload(model, None):
                backends.pop(model).close()
            case Unload(model, str(adapter)):
                backends[model].remove_adapter(adapter)


def _stage(channel: Channel, step: Callable[[_Job], None], jobs: _Jobs, hand_on: Callable[[_Job], None]) -> None:
    """Run a stage: take a batch, do the step, pass it on. Runs in its own thread."""
    while (job := jobs.get()) is not None:
        began = time.monotonic()
        try:
            step(job)
        except DeviceLost:
            log.exception("the device of this worker is lost")
            channel.close()  # the server starts another worker and gives it what this one had
        except Exception as error:
            log.exception("a batch of %d images failed in %s", len(job.run.seeds), step.__name__)
            _send(channel.send, BatchFailed(job.run.batch, "memory" if isinstance(error, MemoryError) else "error"))
        else:
            job.seconds[step.__name__] = time.monotonic() - began
            job.began[step.__name__] = began
            _send(hand_on, job)


def _send(send: Callable[[Any], None], message: Any) -> None:
    """Send to a server that may be gone. The reading thread notices that and ends the worker."""
    try:
        send(message)
    except OSError:
        log.debug("the server is gone")


def loader(start: WorkerConfig) -> ModelLoader:
    """Return the function that loads models on a device. It imports torch at the first one."""

    def load(command: LoadModel) -> Backend:
        if start.device == "simulator":
            return _simulate(command, start.simulated_profile)
        if command.folder is not None and not Path(command.folder).is_dir():  # refused before imports that take seconds
            raise StartError(f"model {command.folder}: there is no such folder; give the folder of a student")
        collects = gc.isenabled()
        gc.disable()  # the import creates a million objects and no garbage; searching them takes a fifth of the time
        try:
            from service.engine.model_loader import load_backend
        finally:
            if collects:
                gc.enable()
        return load_backend(command.folder, command.name, start.device, start.runtime, start.tuning)

    return load


def make_timer(profiling: Profiling) -> Timer:
    """Return the function that times a model, or reads its profile."""

    def timer(backend: Backend) -> Sequence[Timing]:
        if profiling.folder:
            return recall(backend, profiling.timed_batches, Path(profiling.folder))
        return measure(backend, (*profiling.timed_batches, *backend.slow_first_runs), repeats=1)

    return timer


def _simulate(command: LoadModel, profile_path: str | None) -> Backend:
    """Return a simulator of a student folder, or of a profile."""
    simulator = Simulator()
    if profile_path:
        profile = read_profile(Path(profile_path))
        simulator = Simulator(info=profile.info, timings=profile.timings)
    if command.folder is not None:
        try:
            name = str(json.loads((Path(command.folder) / "onestep.json").read_text(encoding="utf-8"))["name"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StartError(f"{command.folder} is not a student folder: {error}") from None
        simulator.info = replace(simulator.info, name=command.name or name, digest=f"simulator of {command.folder}")
    return simulator


def _end_with_server(connection: socket.socket) -> None:
    """End this process when the other side of the connection is closed."""
    hang_up = select.poll()
    hang_up.register(connection, 0)  # POLLHUP is reported in any case
    hang_up.poll()
    os._exit(0)


def main() -> None:
    for number in EXIT_SIGNALS:  # the terminal sends them to the whole group; the server first finishes its work
        signal.signal(number, signal.SIG_IGN)
    descriptor, pixels, embeddings, start = sys.argv[1:]
    connection = socket.socket(fileno=int(descriptor))
    threading.Thread(target=_end_with_server, args=(connection,), name="end", daemon=True).start()
    channel = Channel(connection)
    config = msgspec.json.decode(start, type=WorkerConfig)
    configure(config.log_format, config.log_level)
    memory = Memory(int(pixels), int(embeddings))
    serve(channel, memory, config.models, loader(config), make_timer(config.profiling))
    os._exit(0)  # without waiting for threads that use the device


if __name__ == "__main__":
    main()
