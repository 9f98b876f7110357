"""Our server beside two others in the same run: requests/s, latencies, and what is left of the engine's own rate.

`naive` is what a first afternoon gives: FastAPI, stock `StableDiffusion3Pipeline`, one call a request, a lock.
`litserve` is LitServe with the same stock pipeline and its own batching. All serve the same student on the same device
to the same clients, one server at a time, each in a process of its own; `engine` is ours without HTTP and without
image formats. The CPU time of a request, of all processes of a server, is the figure that other programs on the machine
disturb least. `--rounds` alternates the servers, and the medians are shown.

    pip install -e .[bench]
    python benchmarks/serve.py [--clients 1 8 32 128] [--seconds 10] [--rounds 3] [--model FOLDER] [--json]
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from stock import Stock

from service.commands.bench import LoadResult, free_port, measure_engine, measure_server, running_server
from service.settings import Settings

SHIPPED = Path(__file__).parents[1] / "distill" / "worlds" / "scenes" / "weights" / "student"
MAX_BATCH = 16  # of LitServe's batches, as of ours
BATCH_SECONDS = 0.01  # that LitServe waits for company


def naive(model: str, port: int) -> None:
    """Serve a student one request at a time."""
    import uvicorn
    from fastapi import FastAPI

    stock = Stock(model)
    lock = threading.Lock()
    app = FastAPI()

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {}

    @app.post("/v1/images/generations")
    def generate(body: dict) -> dict:
        with lock:
            return stock.answer([body])[0]

    uvicorn.run(app, port=port, log_level="warning")


def litserve(model: str, port: int) -> None:
    """Serve a student in LitServe's batches."""
    from litserve import LitServer
    from litserve_api import Api  # of a module of its own, since LitServe's workers unpickle it

    api = Api(model, max_batch_size=MAX_BATCH, batch_timeout=BATCH_SECONDS, api_path="/v1/images/generations")
    server = LitServer(api, accelerator="auto", healthcheck_path="/readyz", timeout=120)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


OTHERS = {"naive": naive, "litserve": litserve}


def cpu_seconds() -> float:
    """Return the CPU time of all running child processes, including their own children."""
    ticks: dict[int, int] = {}
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return sum(ticks[pid] for pid in below - {os.getpid()}) / os.sysconf("SC_CLK_TCK")


def figures(load: LoadResult) -> dict[str, float]:
    """Requests/s of a load, and quantiles of its latencies in seconds."""
    quantiles = {f"p{100 * share:.0f}_seconds": load.quantile(share) for share in (0.5, 0.95, 0.99)}
    return {"requests_per_second": load.rate, **quantiles}


def measured(name: str, model: str, clients: Sequence[int], seconds: float) -> list[dict[str, float]]:
    """Start a server, or our engine alone, and measure it with each number of clients."""
    if name == "engine":
        settings = Settings(models=(Path(model),))
        return [figures(measure_engine(settings, count, seconds)) for count in clients]
    port = free_port()
    command = [sys.executable, "-m", "service.cli", "serve", "--model", model, "--port", str(port)]
    if name in OTHERS:
        command = [sys.executable, os.path.abspath(__file__), "--serve", name, "--model", model, "--port", str(port)]
    found = []
    with running_server(command, port) as url:
        for count in clients:
            before = cpu_seconds()
            load = measure_server(url, count, seconds)
            requests = len(load.latencies) + count  # each client sends one before the time starts
            found.append(figures(load) | {"cpu_seconds_per_request": (cpu_seconds() - before) / requests})
            print(f"{name}, {count} clients: {found[-1]}", file=sys.stderr)
    return found


def medians(rounds: Sequence[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The median of each figure over the rounds, for each number of clients."""
    return [
        {key: statistics.median(each[key] for each in same) for key in same[0]} for same in zip(*rounds, strict=True)
    ]


def main() -> None:
    """Measure all servers, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--beside", nargs="*", choices=OTHERS, default=list(OTHERS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=OTHERS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        OTHERS[arguments.serve](arguments.model, arguments.port)
        return
    names = ("engine", "service", *arguments.beside)
    rounds: dict[str, list[list[dict[str, float]]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            rounds[name].append(measured(name, arguments.model, arguments.clients, arguments.seconds))
    results = {name: medians(rounds[name]) for name in names}
    if arguments.json:
        print(json.dumps({"clients": arguments.clients, **results}, indent=2))
        return
    print("| clients | " + " | ".join(f"{name}: req/s, p50, p99, CPU ms" for name in results) + " | ours over |")
    print("|---" * (len(results) + 2) + "|")
    for i, clients in enumerate(arguments.clients):
        cells = []
        for each in results.values():
            keys = ("p50_seconds", "p99_seconds", "cpu_seconds_per_request")
            values = [f"{1000 * each[i][key]:.{int('cpu' in key)}f}" for key in keys if key in each[i]]
            cells.append(", ".join([f"{each[i]['requests_per_second']:.1f}", *values]))
        own = results["service"][i]["requests_per_second"]
        ratios = [
            f"{name} {own / each[i]['requests_per_second']:.2f}" for name, each in results.items() if name != "service"
        ]
        print(f"| {clients} | " + " | ".join(cells) + f" | {', '.join(ratios)} |")


if __name__ == "__main__":
    main()
