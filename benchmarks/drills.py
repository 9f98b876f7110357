"""Test a real server over HTTP under overload, sustained load and killed workers.

    python benchmarks/drills.py overload [--seconds 60]               ten times its capacity
    python benchmarks/drills.py soak [--seconds 3600] [--device cpu]  full load; memory must not grow
    python benchmarks/drills.py chaos [--kills 20] [--device cpu]     workers killed at random under load
    python benchmarks/drills.py fleet [--seconds 10] [--clients 64]   eight devices with 20 ms per batch

`overload` and `fleet` use simulated devices. `soak` and `chaos` compare every image bit by bit with that of an
undisturbed server. Each test prints its results, and exits with status 1 if a request is lost or gets neither its image
nor a refusal with Retry-After, if the queue exceeds its limit, or if memory grows. Rates and latencies are only printed
beside their bounds, because they depend on the machine.
"""

import argparse
import base64
import contextlib
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from PIL import Image

from service.commands.bench import free_port, measure_engine, measure_server, read_metrics, running_server
from service.engine.backend import BatchLimits, ModelInfo, Timing
from service.engine.profile import FORMAT, Profile
from service.observability.metrics import Metrics
from service.settings import EngineSettings, Settings

OVERLOAD = 10  # times the capacity
QUEUE = 40  # images that may wait
CALL_SECONDS = 0.1  # per batch of the overloaded device
DISTINCT = 8  # requests that each client of soak and chaos repeats
GROWTH = 0.02  # maximum growth of memory in the second half of a soak, as a share
BATCH_SECONDS = 0.02  # per batch of the fleet's devices


class Answer(NamedTuple):
    """A response and its time."""

    seconds: float
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """An HTTP client with one connection per thread."""

    def __init__(self, url: str) -> None:
        self._host = url.removeprefix("http://")
        self._own = threading.local()
        self._connections: list[http.client.HTTPConnection] = []

    def ask(self, prompt: str, seed: int) -> Answer:
        """Request an image."""
        if not hasattr(self._own, "connection"):
            self._own.connection = http.client.HTTPConnection(self._host, timeout=120)
            self._connections.append(self._own.connection)
        began = time.perf_counter()
        body = json.dumps({"prompt": prompt, "seed": seed})
        self._own.connection.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
        answer = self._own.connection.getresponse()
        data = answer.read()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(time.perf_counter() - began, answer.status, headers, data)

    def close(self) -> None:
        """Close all connections."""
        for connection in self._connections:
            connection.close()


def pixels(answer: Answer) -> str:
    """Return a digest of the pixels of an image, or a description of another response."""
    if answer.status != 200:
        return f"status {answer.status}"
    image = Image.open(io.BytesIO(base64.b64decode(json.loads(answer.body)["data"][0]["b64_json"])))
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


@contextlib.contextmanager
def serving(device: str, **settings: object) -> Iterator[tuple[str, int]]:
    """Run a server with settings. Yields its URL and process id."""
    port = free_port()
    command = [sys.executable, "-m", "service.cli", "serve", "--device", device, "--port", str(port)]
    given = {"data": "none", **settings}
    variables = {f"SERVICE_{name.upper()}": str(value) for name, value in given.items()}
    with running_server(command, port, variables) as url:
        ours = (pid for pid in children(os.getpid()) if f"\0{port}\0" in Path(f"/proc/{pid}/cmdline").read_text())
        yield url, next(ours)


def children(pid: int) -> list[int]:
    """Return the child processes of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def rss_mb(pid: int) -> float:
    """Return the memory of a process in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files(pid: int) -> int:
    """Return the number of open files and connections of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def simulated(folder: str, seconds: float) -> Path:
    """Return a profile of a model whose batches of any size take so many seconds."""
    card = ModelInfo("simulated", "simulator", 0, "simulated", ((64, 64),), 16, 77, (BatchLimits((1,), 1024),))
    times = {"text": 0.0, "model": seconds, "vae": 0.0}
    path = Path(folder) / "simulated.json"
    path.write_bytes(
        msgspec.json.encode(Profile(FORMAT, "simulated", card, [Timing("simulated", 64, 64, 1, times, 0)]))
    )
    return path


def malformed(answer: Answer) -> str | None:
    """Return what is wrong with a refusal, if anything."""
    try:
        error = json.loads(answer.body)["error"]
        wait, milliseconds = int(answer.headers["retry-after"]), int(answer.headers["retry-after-ms"])
        position = int(answer.headers["x-queue-position"])
    except (ValueError, KeyError, TypeError) as fault:
        return f"{type(fault).__name__} {fault}"
    if set(error) != {"message", "type", "param", "code"} or error["code"] not in (
        "queue_full",
        "deadline_unreachable",
    ):
        return f"the error {error}"
    if not 1 <= wait == math.ceil(milliseconds / 1000) or not 0 <= position <= QUEUE:
        return f"retry after {wait} s or {milliseconds} ms, at queue position {position}"
    return None


@dataclass(frozen=True)
class Overload:
    """The results of an overload."""

    capacity: float  # images/s
    offered: float
    unloaded_p99: float  # seconds
    accepted: Sequence[float]
    refused: Sequence[float]
    others: Sequence[int]  # statuses
    malformed: Sequence[str]  # errors of refusals
    waiting: Sequence[int]  # samples of the number of queued images
    memory: Sequence[float]  # MB

    def errors(self) -> Iterator[str]:
        """Yield what must not happen."""
        if self.others:
            yield f"{len(self.others)} requests got other statuses: {sorted(set(self.others))}"
        if self.malformed:
            yield f"{len(self.malformed)} refusals are invalid, the first: {self.malformed[0]}"
        if not self.accepted or not self.refused:
            yield "there was no overload: no image was generated, or no request was refused"
        if max(self.waiting) > QUEUE:
            yield f"{max(self.waiting)} images waited, over the limit of {QUEUE}"

    def show(self) -> None:
        """Print everything beside its bounds."""
        bound = 2 * self.unloaded_p99 + QUEUE / self.capacity
        print(f"capacity {self.capacity:.1f}/s, offered {self.offered:.1f}/s")
        print(f"accepted {len(self.accepted)}: p99 {quantile(self.accepted, 0.99):.2f} s, bound {bound:.2f} s")
        p50, p99 = (1000 * quantile(self.refused, share) for share in (0.5, 0.99))
        print(f"refused {len(self.refused)}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, bound 50 ms")
        print(f"in the queue at most {max(self.waiting)}, bound {QUEUE}")
        print("memory of the server, MB:", " ".join(f"{each:.0f}" for each in self.memory))


def overload(seconds: float, clients: int = 64) -> Overload:
    """Send ten times the capacity over many connections at a constant rate."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(
            "simulator",
            engine__simulated_profile=simulated(folder, CALL_SECONDS),
            engine__max_batch=2,
            engine__max_queued_images=QUEUE,
        ) as (url, pid),
    ):
        before = min(3.0, seconds)
        unloaded = measure_server(url, 1, before).quantile(0.99)
        capacity = measure_server(url, 8, before).rate
        pause = clients / (OVERLOAD * capacity)
        memory, waiting = [rss_mb(pid)], [0]
        began = time.perf_counter()

        def offer(number: int) -> list[Answer]:
            answers: list[Answer] = []
            due = began + number / clients * pause
            while due < began + seconds:
                time.sleep(max(0.0, due - time.perf_counter()))
                answers.append(client.ask(f"overload {number}", len(answers)))
                due = max(due + pause, time.perf_counter())
            return answers

        with contextlib.closing(Client(url)) as client, ThreadPoolExecutor(clients) as pool:
            offering = [pool.submit(offer, number) for number in range(clients)]
            while time.perf_counter() < began + seconds:
                time.sleep(seconds / 10)
                memory.append(rss_mb(pid))
                waiting.append(int(read_metrics(url)["fgm_queued_images"]))
            answers = [answer for done in offering for answer in done.result()]
    refusals = [answer for answer in answers if answer.status == 429]
    return Overload(
        capacity,
        len(answers) / seconds,
        unloaded,
        [answer.seconds for answer in answers if answer.status == 200],
        [answer.seconds for answer in refusals],
        [answer.status for answer in answers if answer.status not in (200, 429)],
        [fault for answer in refusals if (fault := malformed(answer))],
        waiting,
        memory,
    )


class Load:
    """Clients that request the same images all the time, and compare each with the first one."""

    def __init__(self, url: str, clients: int) -> None:
        """Requests every image once, before anything else uses the server."""
        self._client = Client(url)
        self._clients = clients
        self._distinct = DISTINCT * clients
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._expected = list(self._pool.map(self._ask, range(self._distinct)))
        self.lost = [each for each in self._expected if each.startswith("status")]
        self.wrong: list[str] = []
        self.answers = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Send requests while the block runs."""
        asking = [self._pool.submit(self._request_all, number) for number in range(self._clients)]
        try:
            yield
        finally:
            self._stop.set()
            counts = [done.result() for done in asking]
            self._pool.shutdown()
            self._client.close()
        self.answers = sum(counts)

    def errors(self) -> Iterator[str]:
        """Yield what must not happen."""
        if self.lost:
            yield f"{len(self.lost)} requests are lost: {sorted(set(self.lost))}"
        if self.wrong:
            yield f"{len(self.wrong)} images differ"

    def _ask(self, i: int) -> str:
        return pixels(self._client.ask(f"drill {i}", i))

    def _request_all(self, number: int) -> int:
        for asked in itertools.count():
            if self._stop.is_set():
                return asked
            i = (number + asked * self._clients) % self._distinct
            answer = self._ask(i)
            if answer.startswith("status"):
                self.lost.append(answer)
            elif answer != self._expected[i]:
                self.wrong.append(answer)
        raise AssertionError("itertools.count ended")


@dataclass(frozen=True)
class Soak:
    """The results of a sustained load."""

    load: Load
    seconds: float
    times: Sequence[float]  # of the samples of memory
    memory: Sequence[float]  # MB, of the server and its workers
    files: Sequence[int]  # open in the server

    @property
    def growth(self) -> float:
        """MB by which memory grew in the second half, by linear regression."""
        half = len(self.times) // 2
        slope: float = np.polyfit(self.times[half:], self.memory[half:], 1)[0]
        return slope * (self.times[-1] - self.times[half])

    @property
    def bound(self) -> float:
        """MB by which memory may grow."""
        return GROWTH * float(np.median(self.memory))

    def errors(self) -> Iterator[str]:
        """Yield what must not happen. Growth of memory is not included, because short tests only see the warm-up."""
        yield from self.load.errors()
        if not self.load.answers:
            yield "nothing was answered"

    def show(self) -> None:
        """Print everything beside its bounds."""
        rate = self.load.answers / self.seconds
        print(f"{self.load.answers} requests in {self.seconds:.0f} s, {rate:.1f}/s")
        print(f"lost {len(self.load.lost)}, wrong {len(self.load.wrong)}")
        shown = self.memory[:: max(1, len(self.memory) // 12)]
        print("memory of server and workers, MB:", " ".join(f"{each:.0f}" for each in shown))
        print(f"grew by {self.growth:.1f} MB over the second half, bound {self.bound:.1f} MB")
        print(f"open files {self.files[0]} to {self.files[-1]}, at most {max(self.files)}")


def soak(seconds: float, device: str = "simulator", clients: int = 16, looks: int = 120) -> Soak:
    """Load a server fully and sample its memory. Its result cache is off, so that the devices compute."""
    times: list[float] = []
    memory: list[float] = []
    files: list[int] = []
    with serving(device, engine__result_cache_bytes=0) as (url, pid):
        load = Load(url, clients)
        began = time.perf_counter()
        with load.running():
            while not times or times[-1] < seconds:
                time.sleep(seconds / looks)
                times.append(time.perf_counter() - began)
                memory.append(rss_mb(pid) + sum(map(rss_mb, children(pid))))
                files.append(open_files(pid))
    return Soak(load, times[-1], times, memory, files)


@dataclass(frozen=True)
class Chaos:
    """The results of killed workers."""

    load: Load
    kills: int
    restarts: int  # of workers that were ready

    def errors(self) -> Iterator[str]:
        """Yield what must not happen."""
        yield from self.load.errors()

    def show(self) -> None:
        """Print everything."""
        print(f"{self.kills} kills, {self.restarts} restarts of ready workers, {self.load.answers} requests")
        print(f"lost {len(self.load.lost)}, wrong {len(self.load.wrong)}")


def chaos(kills: int, device: str = "simulator", clients: int = 16, seed: int = 0) -> Chaos:
    """Kill workers of a server under load."""
    chance = random.Random(seed)
    with serving(device, engine__workers_per_device=2, engine__result_cache_bytes=0) as (url, pid):
        load = Load(url, clients)
        with load.running():
            killed = 0
            while killed < kills:
                time.sleep(chance.uniform(0.1, 0.5))
                if len(workers := children(pid)) > 1:  # never both workers at the same time
                    os.kill(chance.choice(workers), signal.SIGKILL)
                    killed += 1
        restarts = sum(
            value for name, value in read_metrics(url).items() if name.startswith("fgm_worker_restarts_total")
        )
    return Chaos(load, killed, int(restarts))


@dataclass(frozen=True)
class Fleet:
    """Rates and utilization of many devices, behind the engine alone and behind the server."""

    devices: int
    ready: int  # workers of the server
    engine_rate: float  # images/s
    engine_busy: float
    server_rate: float
    server_busy: float
    refused: int

    def errors(self) -> Iterator[str]:
        """Yield what must not happen."""
        if self.ready != self.devices:
            yield f"{self.ready} of {self.devices} workers are ready"
        if self.refused:
            yield f"{self.refused} requests got no image"

    def show(self) -> None:
        """Print everything."""
        print(f"engine   {self.engine_rate:7.1f} images/s, devices busy {self.engine_busy:.2f}")
        print(f"service  {self.server_rate:7.1f} images/s, devices busy {self.server_busy:.2f}")


def fleet(seconds: float, clients: int = 64, devices: int = 8) -> Fleet:
    """Keep many devices with short batches busy from one process."""
    model = 'fgm_stage_seconds_sum{stage="model"}'
    with tempfile.TemporaryDirectory() as folder:
        profile = simulated(folder, BATCH_SECONDS)
        metrics = Metrics()
        options = {"simulated_profile": profile, "workers_per_device": devices}
        options |= {"max_batch": 1, "max_queued_images": 10_000}
        settings = Settings(data=None, engine=EngineSettings(devices="simulator", **options))
        engine = measure_engine(settings, clients, seconds, metrics)
        engine_busy = metrics.registry.get_sample_value("fgm_stage_seconds_sum", {"stage": "model"}) or 0.0
        with serving("simulator", **{f"engine__{name}": value for name, value in options.items()}) as (url, _):
            before = read_metrics(url).get(model, 0.0)
            server = measure_server(url, clients, seconds)
            after = read_metrics(url)
    return Fleet(
        devices,
        int(after["fgm_workers"]),
        engine.rate,
        engine_busy / (devices * engine.seconds),
        server.rate,
        (after[model] - before) / (devices * server.seconds),
        server.refused,
    )


def quantile(seconds: Sequence[float], share: float) -> float:
    """Return the quantile of response times, or NaN if there are none."""
    return float(np.quantile(seconds, share)) if seconds else math.nan


def main() -> None:
    """Run the test that is named, and print its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drill", choices=("overload", "soak", "chaos", "fleet"))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--device", default="simulator", help="of soak and chaos")
    parser.add_argument("--clients", type=int, help="64 for overload and fleet, else 16")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    arguments = parser.parse_args()
    few, many = arguments.clients or 16, arguments.clients or 64
    found: Overload | Soak | Chaos | Fleet
    match arguments.drill:
        case "overload":
            found = overload(arguments.seconds, many)
        case "soak":
            found = soak(arguments.seconds, arguments.device, few)
        case "chaos":
            found = chaos(arguments.kills, arguments.device, few, arguments.seed)
        case _:
            found = fleet(arguments.seconds, many)
    found.show()
    errors = list(found.errors())
    if isinstance(found, Soak) and found.growth > found.bound:
        errors.append("memory grows; a run of less than ten minutes only sees the warm-up")
    if errors:
        sys.exit("\n".join(errors))


if __name__ == "__main__":
    main()
