"""Load for a running server, and for the engine without one: requests/s, latencies, batches."""

import asyncio
import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np

from service.engine.engine import Engine
from service.engine.launch import worker_processes
from service.engine.request import GenerationRequest
from service.errors import StartError
from service.observability.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)
TIMEOUT_SECONDS = 120.0
END_SECONDS = 40.0  # that a server gets to end


@dataclass(frozen=True)
class Load:
    """What so many clients got, each asking again as soon as it was answered."""

    clients: int
    seconds: float  # from the first question to the last answer
    latencies: Sequence[float]  # seconds, of what was answered with images
    refused: int  # answered otherwise

    @property
    def rate(self) -> float:
        """Images per second."""
        return len(self.latencies) / self.seconds

    def quantile(self, share: float) -> float:
        """Seconds within which this share was answered; NaN when nothing was."""
        return float(np.quantile(self.latencies, share)) if self.latencies else float("nan")


def load_server(url: str, clients: int, seconds: float, key: str | None = None) -> Load:
    """Ask a server for one image after another, each with a prompt and seed that no cache knows.

    Every client has a connection of its own, and asks once before the time starts. Raises StartError when the server
    cannot be reached.
    """
    parts = urlsplit(url)
    run = uuid.uuid4().hex
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    latencies: list[float] = []
    refused: list[float] = []
    began: list[float] = []
    start = threading.Barrier(clients, action=lambda: began.append(time.perf_counter()))

    def client(number: int) -> None:
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        with contextlib.closing(kind(parts.netloc, timeout=TIMEOUT_SECONDS)) as connection:

            def ask(i: int) -> tuple[float, int]:
                asked = time.perf_counter()
                body = json.dumps({"prompt": f"a red circle left of a blue star, {run} {number}", "seed": i})
                connection.request("POST", f"{parts.path.rstrip('/')}/v1/images/generations", body, headers)
                answer = connection.getresponse()
                answer.read()
                return time.perf_counter() - asked, answer.status

            try:
                ask(0)
                connection.close()  # a server need not keep it open until the slowest client is here
                start.wait()
                for i in range(1, sys.maxsize):
                    if time.perf_counter() >= began[0] + seconds:
                        return
                    latency, status = ask(i)
                    (latencies if status == 200 else refused).append(latency)
            except (OSError, http.client.HTTPException) as error:
                start.abort()  # for those that wait for this one
                raise StartError(
                    f"{url} cannot be loaded: {type(error).__name__} {error}; is a server there?"
                ) from None

    with ThreadPoolExecutor(clients) as pool:
        errors = [error for done in [pool.submit(client, i) for i in range(clients)] if (error := done.exception())]
    if errors:
        raise next((error for error in errors if isinstance(error, StartError)), errors[0])
    return Load(clients, time.perf_counter() - began[0], latencies, len(refused))


def load_engine(settings: Settings, clients: int, seconds: float, metrics: Metrics | None = None) -> Load:
    """The same of the engine: batches and workers as in the server, without HTTP and without image formats."""

    async def whole() -> Load:
        engine = Engine(worker_processes(settings), settings, metrics or Metrics())
        await engine.start()
        info = next(iter(engine.models.values()))
        width, height = info.sizes[0]
        latencies: list[float] = []

        def request(prompt: str, seed: int) -> GenerationRequest:
            return GenerationRequest(model=info.name, prompt=prompt, seeds=[seed], width=width, height=height)

        async def client(number: int) -> None:
            i = 0
            while i == 0 or time.perf_counter() < began + seconds:
                asked = time.perf_counter()
                await engine.generate(request(f"a red circle left of a blue star, {number}", i))
                latencies.append(time.perf_counter() - asked)
                i += 1

        try:
            await engine.generate(request("a red circle", 0))
            began = time.perf_counter()
            await asyncio.gather(*(client(number) for number in range(clients)))
            return Load(clients, time.perf_counter() - began, latencies, 0)
        finally:
            await engine.drain()

    return asyncio.run(whole())


@contextlib.contextmanager
def own_server(command: Sequence[str], port: int, variables: Mapping[str, str] | None = None) -> Iterator[str]:
    """A server as a process, with further environment variables, while the block runs; yields its URL once it is ready.

    Raises StartError when it ends.
    """
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        command,
        env=os.environ | dict(variables or {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not _is_ready(port):
            if server.poll() is not None:
                raise StartError(f"the server ended with status {server.returncode}; `{' '.join(command)}` shows why")
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(END_SECONDS)
        except subprocess.TimeoutExpired:  # some servers keep their workers, and themselves, for ever
            log.warning("the server has not ended in %d s; it is killed", END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # and whatever it has left behind
        server.wait()


def free_port() -> int:
    """One that nothing listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _is_ready(port: int) -> bool:
    try:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def samples(url: str) -> dict[str, float]:
    """A server's metrics by name and labels, as `/metrics` writes them. Raises StartError when it does not answer."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    with contextlib.closing(kind(parts.netloc, timeout=5)) as connection:
        try:
            connection.request("GET", f"{parts.path.rstrip('/')}/metrics")
            text = connection.getresponse().read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise StartError(f"{url} does not answer: {error}") from None
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}
