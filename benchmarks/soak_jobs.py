"""Kill servers at random moments while they work on a batch, and see that every line is answered exactly once.

python benchmarks/soak_jobs.py [--kills 20] [--lines 4000] [--servers 1] [--database URL] [--out runs/soak-jobs]

The servers are `fgm-service` processes over the simulator that share one data folder and, if named, one database; with
PostgreSQL there can be several. Kills are spread over the batch: each waits for a random share of its lines, and a
random moment more. A kill is SIGKILL, so nothing can be tidied up; the next server starts at once. Ends with status 1
when a line is missing, is there twice, came out with another seed, or has a link without an image.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai

ENDPOINT = "/v1/images/generations"
LONGEST = 600.0  # seconds in which a batch must end, kills included


class Server:
    """One process, killed and started again on the same port."""

    def __init__(self, out: Path, database: str | None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = out / f"server-{self.port}.log"
        self._environment = os.environ | {
            "SERVICE_DATA": str(out / "data"),
            "SERVICE_JOB_SILENCE_SECONDS": "2",
            "SERVICE_MAX_BATCH": "1",  # so that the batch lasts for all the kills
            "SERVICE_PUBLIC_URL": self.url,
            **({"SERVICE_DATABASE": database} if database else {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """A new process, ready."""
        command = [sys.executable, "-m", "service.cli", "serve", "--device", "simulator", "--port", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, env=self._environment, stderr=log)
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            if self._process.poll() is not None:
                sys.exit(f"a server did not start; see {self._log}")
            time.sleep(0.1)

    def kill(self) -> None:
        """End the process as no process can expect."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Submit, kill, wait, compare, say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--lines", type=int, default=4000)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--database", help="PostgreSQL URL; SQLite if not given")
    parser.add_argument("--longest", type=float, default=1.0, help="seconds that a kill waits at most")
    parser.add_argument("--out", type=Path, default=Path("runs/soak-jobs"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    moments = random.Random(arguments.seed)
    servers = [Server(arguments.out, arguments.database) for _ in range(arguments.servers)]
    with contextlib.ExitStack() as stack:
        for server in servers:
            server.start()
            stack.callback(server.kill)
        client = openai.OpenAI(base_url=f"{servers[0].url}/v1", api_key="none", max_retries=0)
        batch = _submit(client, arguments.lines)
        for share in sorted(moments.random() for _ in range(arguments.kills)):
            _reach(client, batch.id, share * arguments.lines)
            time.sleep(moments.uniform(0, arguments.longest))
            killed = moments.choice(servers)
            killed.kill()
            killed.start()
            batch = client.batches.retrieve(batch.id)
            print(f"killed; {batch.status}, {batch.request_counts.completed} lines", flush=True)
        batch = _wait(client, batch.id)
        if complaints := list(_complaints(client, batch, arguments.lines)):
            sys.exit("\n".join(complaints))
    print(f"{arguments.kills} kills, {arguments.lines} lines: each is there once")


def _submit(client: openai.OpenAI, lines: int) -> openai.types.Batch:
    body = {"prompt": "a red circle"}
    bodies = [body | {"seed": number} if number % 2 else body for number in range(lines)]  # half with seeds
    text = "\n".join(
        json.dumps({"custom_id": f"{number}", "method": "POST", "url": ENDPOINT, "body": body})
        for number, body in enumerate(bodies)
    )
    file = client.files.create(file=("lines.jsonl", text.encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")


def _reach(client: openai.OpenAI, batch_id: str, lines: float) -> None:
    """Wait until so many lines of the batch are made, or all that will be."""
    until = time.monotonic() + LONGEST
    while (batch := client.batches.retrieve(batch_id)).status in ("validating", "in_progress"):
        if batch.request_counts is not None and batch.request_counts.completed >= lines:
            return
        if time.monotonic() > until:
            sys.exit(f"the batch stands still: it is {batch.status} with {batch.request_counts}")
        time.sleep(0.05)


def _wait(client: openai.OpenAI, batch_id: str) -> openai.types.Batch:
    until = time.monotonic() + LONGEST
    while time.monotonic() < until:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.2)
    sys.exit(f"the batch does not end: it is {batch.status} with {batch.request_counts}")


def _complaints(client: openai.OpenAI, batch: openai.types.Batch, lines: int) -> Iterator[str]:
    """What is wrong with a batch that has ended."""
    if batch.status != "completed" or batch.output_file_id is None:
        yield f"the batch is {batch.status}: {batch.errors}"
        return
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    ids = [int(answer["custom_id"]) for answer in answers]
    if sorted(ids) != list(range(lines)):
        yield f"{lines} lines gave {len(ids)} answers, of {len(set(ids))} lines"
    counts = batch.request_counts
    if counts is None or (counts.total, counts.completed, counts.failed) != (lines, lines, 0):
        yield f"the counts are {counts}"
    for number, answer in zip(ids, answers, strict=True):
        if number % 2 and answer["response"]["body"]["data"][0]["seed"] != number:
            yield f"line {number} has another seed"
    for answer in answers[:: max(1, lines // 20)]:
        if httpx.get(answer["response"]["body"]["data"][0]["url"]).status_code != 200:
            yield f"the link of line {answer['custom_id']} leads nowhere"


if __name__ == "__main__":
    main()
