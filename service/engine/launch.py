"""Starts worker processes."""

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import version

import msgspec
import numpy as np
from numpy.typing import NDArray

from service.engine.messages import Channel, LoadFailed, LoadModel, Profiling, Ready, Tuning, WorkerConfig
from service.engine.profile import growing_sizes
from service.engine.shared_memory import read
from service.engine.worker import SLOT_BYTES
from service.errors import StartError
from service.settings import Settings
from service.temporary_folders import make_folder, remove_folder

CHOICES = "choices"  # folder in the data folder: how workers compute each kind of model


@dataclass(eq=False)
class Worker:
    """A running worker: its connection, memory and process."""

    name: str  # its device
    connection: socket.socket
    memory: int  # descriptor of the pixels' memory
    process: subprocess.Popen[bytes] | None  # None for a thread, as in tests
    silence_seconds: float
    ready: Ready = field(init=False, repr=False)  # there once `wait` has returned

    def wait(self) -> None:
        """Wait until its models are loaded. Slow. Raises StartError when it cannot start, dies or is ended."""
        channel = Channel(self.connection)
        self.connection.settimeout(self.silence_seconds)
        try:
            while (reply := channel.next_reply()) is not None:
                match reply:
                    case Ready():
                        self.ready = reply
                        return
                    case LoadFailed():
                        raise StartError(reply.reason)
        except TimeoutError:
            message = f"the worker on {self.name} was silent for {self.silence_seconds:.0f} s while it started"
            raise StartError(message) from None
        raise StartError(f"the worker on {self.name} died while it started; its own messages are above")

    @property
    def device(self) -> str:
        """The device of its models; `auto` is resolved."""
        if self.name != "auto":
            return self.name
        return "cpu" if self.ready.models[0].environment.startswith("cpu-") else "cuda"

    def read(self, slot: int, count: int, shape: tuple[int, int, int]) -> list[NDArray[np.uint8]]:
        """Copy images of one shape from a slot. Raises EOFError or OSError if they are incomplete.

        Each has memory of its own, so that a cached image does not keep the others of its batch.
        """
        images = [np.empty(shape, np.uint8) for _ in range(count)]
        for i, image in enumerate(images):
            read(self.memory, image.data.cast("B"), slot * SLOT_BYTES + i * image.nbytes)
        return images

    def end(self) -> None:
        """Kill the process and close everything. Slow. Safe while another thread waits."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(OSError):  # the other side may be gone already
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        os.close(self.memory)


Launch = Callable[[Sequence[LoadModel]], Worker]  # starts one that loads these models, and returns at once


class SharedMemory:
    """Memory shared by all workers of a server. The system frees it with the last process."""

    def __init__(self) -> None:
        self.descriptor = _memory("embeddings")
        weakref.finalize(self, os.close, self.descriptor)


def start_process(start: WorkerConfig, threads: int, silence_seconds: float, embeddings: SharedMemory) -> Worker:
    """Start a worker as a process. Raises StartError if the system cannot start one."""
    with open_ends() as (ours, theirs, memory):
        descriptors = theirs.fileno(), memory, embeddings.descriptor
        command = [sys.executable, "-m", "service.engine.worker", *map(str, descriptors)]
        try:
            process = subprocess.Popen(
                [*command, msgspec.json.encode(start).decode()],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                env={
                    "OMP_NUM_THREADS": str(threads),
                    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS is reproducible beside other streams only with this
                    **os.environ,
                },
            )
        except OSError as error:
            raise StartError(f"no process for the worker on {start.device}: {error}") from error
        return Worker(start.device, ours, memory, process, silence_seconds)


@contextlib.contextmanager
def open_ends() -> Iterator[tuple[socket.socket, socket.socket, int]]:
    """Open both ends of a socket and the memory for pixels. An error closes all."""
    ours, theirs = socket.socketpair()
    memory = _memory("pixels")
    try:
        yield ours, theirs, memory
    except BaseException:
        ours.close()
        os.close(memory)
        raise
    finally:
        theirs.close()


def _memory(name: str) -> int:
    """Return a descriptor of memory without a name, so that nothing remains if a process dies."""
    if sys.platform == "linux":
        descriptor = os.memfd_create(name)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    return descriptor


class WorkerPool:
    """The workers of a server: how each is started, and their first models."""

    def __init__(self, launches: Sequence[Launch], models: Sequence[LoadModel], devices: Sequence[str] = ()) -> None:
        """`devices` are those of the launches, each once, for the log."""
        self.launches = launches
        self.models = models
        self.devices = devices
        self._workers: list[Worker] = []
        self._ready = False  # whether all have loaded their models
        self._ended = False

    def start(self) -> Sequence[Worker]:
        """Start all workers side by side, once. Slow. As soon as one cannot start, ends all and raises StartError."""
        if not self._ready:
            with ThreadPoolExecutor(len(self.launches)) as pool:
                try:
                    self.launch()
                    for done in as_completed([pool.submit(worker.wait) for worker in self._workers]):
                        done.result()
                except BaseException:
                    self.end()  # or the pool would wait for the others
                    raise
            self._ready = True
        return self._workers

    def launch(self) -> None:
        """Start the processes of `start` without waiting for their models. Raises StartError, also after `end`."""
        if self._ended:
            raise StartError("the workers were ended while they started")
        for launch in self.launches[len(self._workers) :]:
            self._workers.append(launch(self.models))

    def end(self) -> None:
        """End the workers at once, for good. Safe while another thread is in `start`, or about to be."""
        self._ended = True
        while self._workers:
            self._workers.pop().end()


def worker_processes(settings: Settings) -> WorkerPool:
    """Return a pool with the worker processes of each device."""
    engine = settings.engine
    names = serving_devices(settings, _count_gpus()) * engine.workers_per_device
    # Workers on CPUs share the cores, and in each the network and the VAE run side by side. Every image is computed by
    # the same number of threads.
    threads = engine.cpu_threads or max(1, (os.cpu_count() or 1) // (2 * len(names)))
    runtime = settings.runtime.model_dump(mode="json")
    simulated = str(engine.simulated_profile) if engine.simulated_profile else None
    embeddings = SharedMemory()
    folder = settings.data / CHOICES if settings.data else None
    # Without a data folder, choices last as long as the server: a restarted worker must compute the same images.
    temporary = make_folder("fgm-choices-") if folder is None and engine.tuning_seconds else None
    tuning = (
        Tuning(temporary or str(folder), engine.tuning_seconds, engine.max_batch) if engine.tuning_seconds else None
    )

    def launch(device: str) -> Launch:
        def start(models: Sequence[LoadModel]) -> Worker:
            observed = settings.observability
            logs = observed.log_format, observed.log_level
            config = WorkerConfig(device, models, runtime, profiling(settings), tuning, simulated, *logs)
            return start_process(config, threads, engine.heartbeat_timeout_seconds, embeddings)

        return start

    models = [LoadModel(str(student.folder), student.name) for student in settings.models]
    devices = list(dict.fromkeys("cpu" if name == "auto" else name for name in names))  # no CUDA driver shows a GPU
    pool = WorkerPool([launch(name) for name in names], models or [LoadModel(None)], devices)
    if temporary:
        weakref.finalize(pool, remove_folder, temporary)
    return pool


def profiling(settings: Settings) -> Profiling:
    """Return the batch sizes that workers time before they take work."""
    engine = settings.engine
    timed = engine.profiles_folder is not None or engine.target_p95_seconds is not None
    return Profiling(
        timed_batches=growing_sizes(engine.max_batch) if timed else (),
        folder=str(engine.profiles_folder) if engine.profiles_folder else None,
    )


def serving_devices(settings: Settings, gpus: int | None) -> list[str]:
    """Return the devices that get a worker. `auto` is every GPU that is not for jobs.

    `gpus` is the number of GPUs by CUDA's driver, None if unknown. Without GPUs, `auto` is left to torch. Raises
    StartError for a GPU that does not exist, for one that both serves and runs jobs, and if jobs have all GPUs.
    """
    for_jobs = settings.jobs.devices.split(",")
    _check_gpus("jobs.devices", for_jobs, gpus)
    if settings.engine.devices == "auto":
        names = [name for name in (f"cuda:{i}" for i in range(gpus or 0)) if name not in for_jobs]
        if gpus and not names:
            raise StartError(
                f"jobs.devices ({settings.jobs.devices}) names every GPU, so engine.devices = auto has none to "
                "serve on; name fewer there, or pass --devices cpu"
            )
        return names or ["auto"]
    names = [name.strip() for name in settings.engine.devices.split(",")]
    _check_gpus("engine.devices", names, gpus)
    both = {"cuda:0" if name == "cuda" else name for name in names} & {*for_jobs} - {"cpu"}
    if both:
        raise StartError(
            f"engine.devices ({settings.engine.devices}) and jobs.devices ({settings.jobs.devices}) share "
            f"{', '.join(sorted(both))}, where jobs would slow requests down; name it in one of them"
        )
    return names


def _check_gpus(setting: str, names: Sequence[str], gpus: int | None) -> None:
    """Raise StartError for a GPU that CUDA's driver does not show. Torch would find that out after seconds."""
    if gpus is None:
        return
    missing = [name for name in names if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= gpus]
    if missing:
        raise StartError(
            f"{setting} names {', '.join(missing)}, and CUDA's driver shows {gpus} GPUs here; name others, or cpu"
        )


def _count_gpus() -> int | None:
    """Count the GPUs by CUDA's driver, without a context and without torch; 0 without a driver.

    None for a torch of ROCm, which calls its GPUs cuda too.
    """
    if "rocm" in version("torch"):
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value
