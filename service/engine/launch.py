"""Starting workers: as processes, or as threads of this process for backends that are already here."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import numpy as np

from service.engine import worker
from service.engine.backend import Backend, Pixels
from service.engine.messages import Channel, Ready, Refused, Start
from service.engine.worker import SLOT_BYTES
from service.errors import StartError
from service.settings import Settings


@dataclass(frozen=True)
class Worker:
    """A worker that is ready, as the server holds it."""

    name: str  # its device
    connection: socket.socket
    memory: int  # descriptor of the memory that it shares with the server
    ready: Ready
    process: subprocess.Popen[bytes] | None  # None for a thread

    def read(self, slot: int, shape: tuple[int, int, int, int]) -> Pixels:
        """A copy of what the worker has put into a slot."""
        pixels = np.empty(shape, np.uint8)
        os.preadv(self.memory, [pixels.data.cast("B")], slot * SLOT_BYTES)
        return pixels

    def end(self) -> None:
        """Kill the process and let everything go. Slow: call it off the event loop."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.connection.close()
        os.close(self.memory)


Launch = Callable[[], Worker]


def start_process(name: str, start: Start, threads: int, silence_seconds: float) -> Worker:
    """A worker in a process of its own, ready. Raises StartError with its reason when it refuses or dies."""
    with _ends() as (ours, theirs, memory):
        command = [sys.executable, "-m", "service.engine.worker", str(theirs.fileno()), str(memory)]
        process = subprocess.Popen(
            [*command, msgspec.json.encode(start).decode()],
            pass_fds=(theirs.fileno(), memory),
            stdin=subprocess.DEVNULL,
            env={
                "OMP_NUM_THREADS": str(threads),
                "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS is reproducible beside other streams only with this
                **os.environ,
            },
        )
        try:
            return Worker(name, ours, memory, _wait(ours, theirs, name, silence_seconds), process)
        except StartError:
            process.kill()
            process.wait()
            raise


def start_thread(name: str, backends: Mapping[str, Backend], silence_seconds: float) -> Worker:
    """A worker in a thread of this process, with the same messages: for simulations that a test holds in its hand."""
    with _ends() as (ours, theirs, memory):
        end, same = theirs.dup(), os.dup(memory)

        def serve() -> None:
            with end:
                worker.serve(Channel(end), same, lambda: backends)
            os.close(same)

        threading.Thread(target=serve, name=name, daemon=True).start()
        return Worker(name, ours, memory, _wait(ours, theirs, name, silence_seconds), None)


@contextlib.contextmanager
def _ends() -> Iterator[tuple[socket.socket, socket.socket, int]]:
    """A socket's two ends and the memory that the two sides share; an error closes all."""
    ours, theirs = socket.socketpair()
    if sys.platform == "linux":
        memory = os.memfd_create("pixels")  # has no name, so nothing is left behind whoever dies first
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    try:
        yield ours, theirs, memory
    except BaseException:
        ours.close()
        os.close(memory)
        raise
    finally:
        theirs.close()


def _wait(ours: socket.socket, theirs: socket.socket, name: str, silence_seconds: float) -> Ready:
    """What a starting worker says when it is ready."""
    theirs.close()  # the worker has its own by now: when it dies, ours reads the end
    channel = Channel(ours)
    ours.settimeout(silence_seconds)
    try:
        while (reply := channel.next_reply()) is not None:
            match reply:
                case Ready():
                    return reply
                case Refused():
                    raise StartError(reply.reason)
    except TimeoutError:
        raise StartError(f"the worker on {name} was silent for {silence_seconds:.0f} s while it started") from None
    raise StartError(f"the worker on {name} died while it started; its own messages are above")


class Fleet:
    """The workers of a server: how each is started, and the first of each."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        self.launches = launches
        self._started: Sequence[Worker] = ()

    def start(self) -> Sequence[Worker]:
        """All of them, started side by side the first time. Slow. Raises StartError when one cannot."""
        if not self._started:
            with ThreadPoolExecutor(len(self.launches)) as pool:
                starting = [pool.submit(launch) for launch in self.launches]
            errors = [error for done in starting if (error := done.exception())]
            if errors:
                for done in starting:
                    if not done.exception():
                        done.result().end()
                raise errors[0]
            self._started = [done.result() for done in starting]
        return self._started


def processes(settings: Settings) -> Fleet:
    """A worker process for each device and replica."""
    names = [device.strip() for device in settings.devices.split(",")] * settings.replicas
    # Side by side, workers on CPUs share the cores; every image is computed by the same number of threads.
    threads = max(1, (os.cpu_count() or 1) // len(names))

    def launch(device: str) -> Launch:
        start = Start(device, [str(folder.absolute()) for folder in settings.models], settings.prompt_cache_bytes)
        return lambda: start_process(device, start, threads, settings.worker_silence_seconds)

    return Fleet([launch(name) for name in names])


def local(*backends: Backend, workers: int = 1) -> Fleet:
    """Worker threads over backends of this process."""
    by_name = {backend.card.name: backend for backend in backends}
    return Fleet([lambda: start_thread("local", by_name, 30.0)] * workers)
