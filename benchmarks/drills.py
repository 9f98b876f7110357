"""What the server promises when it goes badly, tried on a real one, over HTTP, for as long as you like.

    python benchmarks/drills.py overload [--seconds 60]             ten times what it can take
    python benchmarks/drills.py chaos [--kills 20] [--device cpu]   workers killed at random under load
    python benchmarks/drills.py fleet [--seconds 10] [--clients 64] eight devices of 20 ms a batch behind one process

`overload` and `fleet` use simulated devices. `chaos` compares every image, bit by bit, with the one that an undisturbed
server made; it ends with status 1 when one is lost or differs.
"""

import argparse
import base64
import hashlib
import http.client
import io
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from service.bench import free_port, load_engine, load_server, own_server, samples
from service.engine.backend import Card, Timing
from service.engine.profile import Profile, write_profile
from service.metrics import Metrics
from service.settings import Settings

OVERLOAD = 10  # times the capacity
CLIENTS = 64  # connections that offer the overload
DEVICES = 8
BATCH_SECONDS = 0.02


class Client(threading.local):
    """A connection of each thread's own."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)

    def ask(self, prompt: str, seed: int) -> tuple[float, int, bytes]:
        """Seconds, status and body."""
        began = time.perf_counter()
        body = json.dumps({"prompt": prompt, "seed": seed})
        headers = {"content-type": "application/json"}
        self._connection.request("POST", "/v1/images/generations", body, headers)
        answer = self._connection.getresponse()
        data = answer.read()
        return time.perf_counter() - began, answer.status, data


def serving(port: int, device: str) -> list[str]:
    """The command of a server."""
    return [sys.executable, "-m", "service.cli", "serve", "--device", device, "--port", str(port)]


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rss_mb(pid: int) -> float:
    """Memory of a process in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def simulated(folder: str, seconds: float) -> Path:
    """A profile of a model whose batches of any size take so long."""
    card = Card("simulated", "simulator", 0, "simulated", ((64, 64),), 16, 77, 1)
    times = {"text": 0.0, "model": seconds, "vae": 0.0}
    path = Path(folder) / "simulated.json"
    write_profile(path, Profile(1, "simulated", card, [Timing("simulated", 64, 64, 1, times, 0)]))
    return path


def server_of(port: int) -> int:
    """The process of this one's that listens on a port."""
    return next(pid for pid in children(os.getpid()) if f"\0{port}\0" in Path(f"/proc/{pid}/cmdline").read_text())


def overload(seconds: float) -> None:
    """Offer ten times the capacity from many connections at a steady pace."""
    queue = 40
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "SERVICE_SIMULATE": str(simulated(folder, 0.1)),
            "SERVICE_MAX_BATCH": "2",
            "SERVICE_QUEUE_LIMIT": str(queue),
        }
        port = free_port()
        with own_server(serving(port, "simulator"), port) as url:
            pid = server_of(port)
            unloaded = load_server(url, 1, 3.0)
            capacity = load_server(url, 8, 3.0).rate
            client, pause = Client(url), CLIENTS / (OVERLOAD * capacity)
            memory = [rss_mb(pid)]
            began = time.perf_counter()

            def offer(number: int) -> list[tuple[float, int]]:
                answers: list[tuple[float, int]] = []
                due = began + number / CLIENTS * pause
                while due < began + seconds:
                    time.sleep(max(0.0, due - time.perf_counter()))
                    elapsed, status, _ = client.ask(f"overload {number}", len(answers))
                    answers.append((elapsed, status))
                    due = max(due + pause, time.perf_counter())
                return answers

            with ThreadPoolExecutor(CLIENTS) as pool:
                offering = [pool.submit(offer, number) for number in range(CLIENTS)]
                while time.perf_counter() < began + seconds:
                    time.sleep(seconds / 10)
                    memory.append(rss_mb(pid))
                answers = [answer for done in offering for answer in done.result()]
    accepted = [elapsed for elapsed, status in answers if status == 200]
    refused = [elapsed for elapsed, status in answers if status == 429]
    others = len(answers) - len(accepted) - len(refused)
    bound = 2 * unloaded.quantile(0.99) + queue / capacity
    print(f"capacity {capacity:.1f}/s, offered {len(answers) / seconds:.1f}/s, made {len(accepted) / seconds:.1f}/s")
    print(
        f"accepted p99 {np.quantile(accepted, 0.99):.2f} s; twice the unloaded p99 and the queue's time: {bound:.2f} s"
    )
    p50, p99 = 1000 * np.quantile(refused, [0.5, 0.99])
    print(f"refused {len(refused)}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    print(f"answered otherwise {others}")
    print("memory of the server, MB:", " ".join(f"{each:.0f}" for each in memory))


def chaos(kills: int, device: str, clients: int, seed: int) -> None:
    """Kill workers of a server that is asked all the time, and compare what it answers."""
    os.environ |= {"SERVICE_REPLICAS": "2", "SERVICE_RESULT_CACHE_BYTES": "0"}
    distinct = 8 * clients
    chance = random.Random(seed)
    port = free_port()
    with own_server(serving(port, device), port) as url:
        server, client = server_of(port), Client(url)

        def ask(i: int) -> tuple[int, str]:
            _, status, data = client.ask(f"chaos {i % distinct}", i % distinct)
            if status != 200:
                return i, f"status {status}"
            image = Image.open(io.BytesIO(base64.b64decode(json.loads(data)["data"][0]["b64_json"])))
            return i, hashlib.sha256(np.asarray(image).tobytes()).hexdigest()

        with ThreadPoolExecutor(clients) as pool:
            expected = dict(pool.map(ask, range(distinct)))
            stop = threading.Event()
            answers: list[tuple[int, str]] = []

            def go_on(number: int) -> None:
                i = number
                while not stop.is_set():
                    answers.append(ask(i))
                    i += clients

            asking = [pool.submit(go_on, number) for number in range(clients)]
            killed = 0
            while killed < kills:
                time.sleep(chance.uniform(0.1, 0.5))
                if len(workers := children(server)) > 1:  # one of two at a time, also while another one starts
                    os.kill(chance.choice(workers), signal.SIGKILL)
                    killed += 1
            stop.set()
            for done in asking:
                done.result()
        restarts = sum(value for name, value in samples(url).items() if name.startswith("fgm_worker_restarts_total"))
    lost = [answer for _, answer in answers if answer.startswith("status")]
    wrong = [i for i, answer in answers if not answer.startswith("status") and answer != expected[i % distinct]]
    print(f"{killed} kills, {restarts:.0f} restarts of ready workers, {len(answers)} requests of {clients} clients")
    print(f"lost {len(lost)}, wrong {len(wrong)}")
    sys.exit(1 if lost or wrong or any(answer.startswith("status") for answer in expected.values()) else 0)


def fleet(seconds: float, clients: int) -> None:
    """The share of their time that eight devices compute, behind the engine alone and behind the server."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "SIMULATE": str(simulated(folder, BATCH_SECONDS)),
            "DEVICES": "simulator",
            "REPLICAS": str(DEVICES),
            "MAX_BATCH": "1",
            "QUEUE_LIMIT": "10000",
        }
        os.environ |= {f"SERVICE_{name}": value for name, value in settings.items()}
        metrics = Metrics()
        load = load_engine(Settings(), clients, seconds, metrics)
        busy = metrics.registry.get_sample_value("fgm_stage_seconds_sum", {"stage": "model"}) or 0.0
        print(f"engine   {load.rate:7.1f} images/s, devices busy {busy / (DEVICES * load.seconds):.2f}")
        port = free_port()
        with own_server(serving(port, "simulator"), port) as url:
            model = 'fgm_stage_seconds_sum{stage="model"}'
            before = samples(url).get(model, 0.0)
            load = load_server(url, clients, seconds)
            busy = samples(url)[model] - before
        print(f"service  {load.rate:7.1f} images/s, devices busy {busy / (DEVICES * load.seconds):.2f}")


def main() -> None:
    """Run the drill that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drill", choices=("overload", "chaos", "fleet"))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--device", default="simulator", help="of chaos")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    arguments = parser.parse_args()
    match arguments.drill:
        case "overload":
            overload(arguments.seconds)
        case "chaos":
            chaos(arguments.kills, arguments.device, arguments.clients, arguments.seed)
        case "fleet":
            fleet(arguments.seconds, arguments.clients)


if __name__ == "__main__":
    main()
