"""Load tests of a server, and of the engine without HTTP: requests/s, latencies, batch sizes."""

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

import httpx2
import numpy as np

from service.engine.engine import Engine
from service.engine.launch import worker_processes
from service.engine.request import GenerationRequest
from service.errors import StartError
from service.observability.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)
TIMEOUT_SECONDS = 120.0
EXIT_SECONDS = 40.0  # within which a server must exit after SIGTERM


@dataclass(frozen=True)
class LoadResult:
    """Result of a load test with clients that send their next request as soon as they have a response."""

    clients: int
    seconds: float  # from the first request to the last response
    latencies: Sequence[float]  # seconds, of successful requests
    refused: int  # unsuccessful requests

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def quantile(self, share: float) -> float:
        """Return a quantile of the latencies in seconds; NaN if there are none."""
        return float(np.quantile(self.latencies, share)) if self.latencies else float("nan")


def measure_server(url: str, clients: int, seconds: float, key: str | None = None) -> LoadResult:
    """Measure a server with requests for one image each, whose prompts and seeds miss all caches.

    Every client has its own connection, and sends one request before the time starts. Raises StartError if the server
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
                sent = time.perf_counter()
                body = json.dumps({"prompt": f"a red circle left of a blue star, {run} {number}", "seed": i})
                connection.request("POST", f"{parts.path.rstrip('/')}/v1/images/generations", body, headers)
                answer = connection.getresponse()
                answer.read()
                return time.perf_counter() - sent, answer.status

            try:
                ask(0)
                connection.close()  # the server may close it before the slowest client is ready
                start.wait()
                for i in range(1, sys.maxsize):
                    if time.perf_counter() >= began[0] + seconds:
                        return
                    latency, status = ask(i)
                    (latencies if status == 200 else refused).append(latency)
            except (OSError, http.client.HTTPException) as error:
                start.abort()  # for clients that wait for this one
                raise StartError(
                    f"{url} cannot be reached: {type(error).__name__} {error}; is a server running there?"
                ) from None

    with ThreadPoolExecutor(clients) as pool:
        errors = [error for done in [pool.submit(client, i) for i in range(clients)] if (error := done.exception())]
    if errors:
        raise next((error for error in errors if isinstance(error, StartError)), errors[0])
    return LoadResult(clients, time.perf_counter() - began[0], latencies, len(refused))


def measure_engine(settings: Settings, clients: int, seconds: float, metrics: Metrics | None = None) -> LoadResult:
    """Measure the engine with the workers and batches of the server, but without HTTP and image encoding."""

    async def whole() -> LoadResult:
        engine = Engine(worker_processes(settings), settings, metrics or Metrics())
        await engine.start()
        info = next(iter(engine.catalog.models.values()))
        width, height = info.sizes[0]
        latencies: list[float] = []

        def request(prompt: str, seed: int) -> GenerationRequest:
            return GenerationRequest(model=info.name, prompt=prompt, seeds=[seed], width=width, height=height)

        async def client(number: int) -> None:
            i = 0
            while i == 0 or time.perf_counter() < began + seconds:
                sent = time.perf_counter()
                await engine.generate(request(f"a red circle left of a blue star, {number}", i))
                latencies.append(time.perf_counter() - sent)
                i += 1

        try:
            await engine.generate(request("a red circle", 0))
            began = time.perf_counter()
            await asyncio.gather(*(client(number) for number in range(clients)))
            return LoadResult(clients, time.perf_counter() - began, latencies, 0)
        finally:
            await engine.drain()

    return asyncio.run(whole())


@contextlib.contextmanager
def running_server(command: Sequence[str], port: int, variables: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run a server process, with additional environment variables; yield its URL once it is ready.

    Raises StartError if it exits before that.
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
                raise StartError(f"the server exited with status {server.returncode}; `{' '.join(command)}` shows why")
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:  # some servers never exit
            log.warning("the server has not exited within %d s; killing it", EXIT_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # and the processes that it left behind
        server.wait()


def free_port() -> int:
    """Return a port that nothing listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _is_ready(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def read_metrics(url: str) -> dict[str, float]:
    """Read `/metrics` of a server: values by name and labels. Raises StartError if it does not respond."""
    try:
        text = httpx2.get(f"{url.rstrip('/')}/metrics", timeout=5, trust_env=False).text
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise StartError(f"{url} does not respond: {error}") from None
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}
