"""Our server against a naive one, in the same run: requests/s, latencies, and their ratio.

The naive server is what a first afternoon gives: FastAPI, stock `StableDiffusion3Pipeline`, one call a request, a lock.
Both serve the same student on the same device to the same clients, each in a process of its own.

    python benchmarks/serve.py [--clients 16] [--requests 200] [--model FOLDER] [--json]
"""

import argparse
import base64
import io
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np

SHIPPED = Path(__file__).parents[1] / "distill" / "scenes" / "weights" / "student"


def naive(model: str, port: int) -> None:
    """Serve a student one request at a time."""
    import torch
    import uvicorn
    from diffusers import StableDiffusion3Pipeline
    from fastapi import FastAPI

    record = json.loads((Path(model) / "onestep.json").read_text())
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        model, text_encoder_3=None, tokenizer_3=None, local_files_only=True, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    lock = threading.Lock()
    app = FastAPI()

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {}

    @app.post("/v1/images/generations")
    def generate(body: dict) -> dict:
        size = record["image_size"]
        with lock:
            image = pipeline(
                body["prompt"],
                num_inference_steps=1,
                guidance_scale=0,
                height=size,
                width=size,
                max_sequence_length=record["max_sequence_length"],
                generator=torch.Generator().manual_seed(body["seed"]),
            ).images[0]
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return {"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}

    uvicorn.run(app, port=port, log_level="warning")


def measure(command: list[str], port: int, clients: int, requests: int) -> dict[str, float]:
    """Start a server, load it, stop it."""
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # stdout is for the figures
    try:
        while True:
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                if server.poll() is not None:
                    sys.exit(f"{command} ended with {server.returncode}")
            time.sleep(0.1)
        with httpx.Client(timeout=120, limits=httpx.Limits(max_connections=clients)) as client:

            def ask(i: int) -> float:
                started = time.perf_counter()
                body = {"prompt": f"a red circle left of a blue star, number {i}", "seed": i}  # caches know none
                client.post(f"{url}/v1/images/generations", json=body).raise_for_status()
                return time.perf_counter() - started

            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(ask, range(clients)))  # warm
                started = time.perf_counter()
                latencies = list(pool.map(ask, range(clients, clients + requests)))
                elapsed = time.perf_counter() - started
    finally:
        server.terminate()
        server.wait()
    p50, p95 = np.quantile(latencies, [0.5, 0.95])
    return {"requests_per_second": requests / elapsed, "p50_seconds": float(p50), "p95_seconds": float(p95)}


def main() -> None:
    """Measure both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED))
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--naive-port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.naive_port:
        naive(arguments.model, arguments.naive_port)
        return
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    ours = [sys.executable, "-m", "service.cli", "serve", "--model", arguments.model, "--port", str(ports[0])]
    theirs = [sys.executable, __file__, "--model", arguments.model, "--naive-port", str(ports[1])]
    results = {
        "service": measure(ours, ports[0], arguments.clients, arguments.requests),
        "naive": measure(theirs, ports[1], arguments.clients, arguments.requests),
    }
    ratio = results["service"]["requests_per_second"] / results["naive"]["requests_per_second"]
    if arguments.json:
        print(json.dumps({**results, "ratio": ratio}, indent=2))
        return
    for name, figures in results.items():
        print(f"{name:8}", "  ".join(f"{key} {value:.3f}" for key, value in figures.items()))
    print(f"ratio    {ratio:.2f} times the requests/s with {arguments.clients} clients")


if __name__ == "__main__":
    main()
