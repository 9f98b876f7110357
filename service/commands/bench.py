"""Load tests of a server, and of the engine without HTTP: requests/s, latencies, batch sizes."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import httptools
import httpx2
import numpy as np
from uvicorn.loops.auto import auto_loop_factory

from service.engine.engine import Engine
from service.engine.launch import worker_processes
from service.engine.request import GenerationRequest
from service.errors import StartError
from service.observability.metrics import Metrics
from service.settings import Settings

T = TypeVar("T")
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


class _Connection(asyncio.Protocol):
    """A connection to a server, with one request at a time. It keeps no bodies."""

    closed = False  # by either side, or by the last response

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a socket's, always
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def ask(self, request: bytes) -> int:
        """Send a request and return the status of its response. Raises OSError without one."""
        self._status = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._status

    def close(self) -> None:
        self.closed = True
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the response is invalid ({error})"))

    def on_message_complete(self) -> None:
        """Take the end of a response from the parser."""
        self.closed = not self._parser.should_keep_alive()
        if not self._status.done():
            self._status.set_result(self._parser.get_status_code())

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("the server closed the connection"))

    def _fail(self, error: Exception) -> None:
        self.close()
        if not self._status.done():
            self._status.set_exception(error)


class _Client:
    """A client with a connection of its own."""

    def __init__(self, url: SplitResult, number: int, run: str, key: str | None) -> None:
        self._url = url
        self._prompt = f"a red circle left of a blue star, {run} {number}"
        lines = [f"POST {url.path.rstrip('/')}/v1/images/generations HTTP/1.1", f"host: {url.netloc}"]
        lines += [f"authorization: Bearer {key}"] if key else []
        self._head = "\r\n".join([*lines, "content-type: application/json", "content-length: "])
        self._connection: _Connection | None = None

    async def ask(self, seed: int) -> tuple[float, int]:
        """Ask for one image. Returns seconds and status of the response. Raises OSError without one."""
        began = time.perf_counter()
        if self._connection is None or self._connection.closed:
            tls = self._url.scheme == "https"
            address = self._url.hostname or "", self._url.port or (443 if tls else 80)
            loop = asyncio.get_running_loop()
            _, self._connection = await loop.create_connection(_Connection, *address, ssl=tls or None)
        body = json.dumps({"prompt": self._prompt, "seed": seed})
        status = await self._connection.ask(f"{self._head}{len(body)}\r\n\r\n{body}".encode())
        return time.perf_counter() - began, status

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def measure_server(url: str, clients: int, seconds: float, key: str | None = None) -> LoadResult:
    """Measure a server with requests for one image each, whose prompts and seeds miss all caches.

    Every client has its own connection, and sends one request before the time starts. All share one thread, so that
    they take little of the CPU time that they measure. Raises StartError if the server cannot be reached.
    """
    run = uuid.uuid4().hex
    everyone = [_Client(urlsplit(url), number, run, key) for number in range(clients)]
    latencies: list[float] = []
    refused: list[float] = []

    async def repeat(client: _Client, end: float) -> None:
        for seed in range(1, sys.maxsize):
            if time.perf_counter() >= end:
                return
            latency, status = await client.ask(seed)
            (latencies if status == 200 else refused).append(latency)

    async def whole() -> float:
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await asyncio.gather(*(client.ask(0) for client in everyone))
            for client in everyone:
                client.close()  # the server may close it before the slowest client is ready
            began = time.perf_counter()
            async with asyncio.timeout(seconds + TIMEOUT_SECONDS):
                await asyncio.gather(*(repeat(client, began + seconds) for client in everyone))
            return time.perf_counter() - began
        finally:
            for client in everyone:
                client.close()
            await asyncio.sleep(0)  # transports close in the loop's next pass

    try:
        elapsed = _run(whole())
    except OSError as error:
        raise StartError(
            f"{url} cannot be reached: {type(error).__name__} {error}; is a server running there?"
        ) from None
    return LoadResult(clients, elapsed, latencies, len(refused))


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

    return _run(whole())


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run on an event loop as the server's."""
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        return runner.run(work)


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
