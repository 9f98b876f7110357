"""Kill servers, runs and the database at random moments of a batch and jobs, and check that each result exists once.

python benchmarks/soak_jobs.py [--kills 20] [--lines 4000] [--servers 1] [--jobs 2 [--images 640]]
                               [--postgres [--outages 2] [--outage 60] | --database URL] [--out runs/soak-jobs]

The servers are `fgm-service` processes with the simulator that share one data folder and one database. With PostgreSQL
there can be several servers; `--postgres` starts a PostgreSQL from Debian's packages. Jobs distill the shipped teacher
with a small budget. Faults are spread over the work: each waits for a random share of it, and a random time more.

A kill is SIGKILL: of a server, which is started again at once, or of the process of a running job. An outage stops
PostgreSQL for `--outage` seconds, every second time by SIGKILL. During an outage, requests that need it must be refused
with 503 and Retry-After, and single images must be generated. Everything else must recover without help.

Exits with status 1 if a line is missing, occurs twice, has another seed, or has a link without an image; if the student
of a job generates no image, or an event is missing, occurs twice or is out of order; or if a server refuses a request
in another way.
"""

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import psutil
from openai.types.fine_tuning import FineTuningJob
from postgres import Postgres, programs, running

ENDPOINT = "/v1/images/generations"
IMAGE = {"prompt": "a red circle"}
STEP = 16  # batch size of a job
DISTILLATION = {
    "preset": "scenes-debug",
    "batch": STEP,
    "warmup_images": 0,
    "log_every": STEP,
    "checkpoint_every": 2 * STEP,
}
SUPERVISOR = "service.jobs.fine_tuning.process_supervisor"
LONGEST = 1800.0  # seconds without progress after which the test gives up


class Server:
    """A server process that is killed and started again on the same port."""

    def __init__(self, out: Path, database: str | None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = out / f"server-{self.port}.log"
        self._environment = os.environ | {
            "SERVICE_DATA": str(out / "data"),
            "SERVICE_JOBS__TAKEOVER_SECONDS": "2",
            "SERVICE_JOBS__NICE": "0",
            "SERVICE_ENGINE__MAX_BATCH": "1",  # so that the batch takes long enough
            "SERVICE_HTTP__PUBLIC_URL": self.url,
            **({"SERVICE_JOBS__DATABASE": database} if database else {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start a process and wait until it is ready."""
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
        """Kill the process."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def run(self) -> psutil.Process | None:
        """Return the process of its running job, if there is one."""
        assert self._process is not None
        for child in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has exited since
                words = child.cmdline()
                if "distill.cli" in words and "run" in words and SUPERVISOR not in words:
                    return child
        return None


class Work:
    """A batch and jobs, and their results, which one server is asked for."""

    def __init__(self, client: openai.OpenAI, lines: int, jobs: int, images: int) -> None:
        """Submits them. `images` is the budget of each job."""
        self._client, self._lines, self._images = client, lines, images
        bodies = [IMAGE | {"seed": number} if number % 2 else IMAGE for number in range(lines)]  # half with seeds
        text = "\n".join(
            json.dumps({"custom_id": f"{number}", "method": "POST", "url": ENDPOINT, "body": body})
            for number, body in enumerate(bodies)
        )
        file = client.files.create(file=("lines.jsonl", text.encode()), purpose="batch")
        self.batch = client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h").id
        prompts = client.files.create(file=("prompts.txt", b"a red circle\na blue square\n"), purpose="fine-tune")
        options = {"distillation": DISTILLATION | {"images": images, "sample_every": images, "evaluate_every": images}}
        self._jobs = [
            client.fine_tuning.jobs.create(model="scenes", training_file=prompts.id, seed=number, extra_body=options).id
            for number in range(jobs)
        ]

    def share(self) -> tuple[float, str]:
        """Return the completed share, in which the batch counts as one job, and a description."""
        batch = self._client.batches.retrieve(self.batch)
        jobs = [self._client.fine_tuning.jobs.retrieve(name) for name in self._jobs]
        counts = batch.request_counts
        made = counts.completed + counts.failed if counts else 0
        done = [1.0 if batch.status in ("completed", "failed", "expired", "cancelled") else 0.99 * made / self._lines]
        done += [1.0 if _ended(job) else 0.99 * _seen(job) / self._images for job in jobs]
        words = [f"batch {batch.status}, {made} lines", *(f"job {job.status}, {_seen(job)} images" for job in jobs)]
        return sum(done) / len(done), "; ".join(words)

    def reach(self, share: float) -> str:
        """Wait for a completed share, and return a description. Exits if there is no progress."""
        furthest, moved = -1.0, time.monotonic()
        while True:
            done, words = self.share()
            if done >= share:
                return words
            if done > furthest:
                furthest, moved = done, time.monotonic()
            if time.monotonic() - moved > LONGEST:
                sys.exit(f"no progress: {words}")
            time.sleep(0.2)

    def checkpoints(self) -> int:
        """Return the number of checkpoints of all jobs."""
        return sum(len(list(self._client.fine_tuning.jobs.checkpoints.list(name))) for name in self._jobs)

    def errors(self) -> Iterator[str]:
        """Yield everything that is wrong with the results."""
        if len(list(self._client.batches.list())) != 1:
            yield "there is more than one batch"
        yield from self._batch_errors()
        for name in self._jobs:
            yield from (f"{name}: {error}" for error in self._job_errors(name))

    def _batch_errors(self) -> Iterator[str]:
        batch = self._client.batches.retrieve(self.batch)
        if batch.status != "completed" or batch.output_file_id is None:
            yield f"the batch is {batch.status}: {batch.errors}"
            return
        lines = self._lines
        answers = [json.loads(line) for line in self._client.files.content(batch.output_file_id).text.splitlines()]
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
                yield f"the link of line {answer['custom_id']} does not work"

    def _job_errors(self, name: str) -> Iterator[str]:
        job = self._client.fine_tuning.jobs.retrieve(name)
        if job.status != "succeeded" or job.fine_tuned_model is None:
            yield f"it is {job.status}: {job.error}"
            return
        if not self._client.images.generate(model=job.fine_tuned_model, **IMAGE).data:
            yield "its student generates no image"
        events = list(self._client.fine_tuning.jobs.list_events(name, limit=100))[::-1]  # the oldest first
        times = [event.created_at for event in events]
        if times != sorted(times):
            yield "its events are not in the order of their times"
        steps = [event.message for event in events if event.message.startswith("Images seen")]
        if steps != [f"Images seen: {seen} of {self._images}" for seen in range(STEP, self._images + 1, STEP)]:
            yield f"its metrics are not complete and in order: {steps}"
        if [event.message for event in events].count(f"The student is {job.fine_tuned_model}.") != 1:
            yield "its last event does not occur once"


class Faults:
    """Kills and outages of servers and database."""

    def __init__(
        self, servers: list[Server], postgres: Postgres | None, work: Work, moments: random.Random, outage: float
    ) -> None:
        self._servers, self._postgres, self._work = servers, postgres, work
        self._moments, self._outage = moments, outage
        self._checkpoints = -1  # at the last kill of a run; repeated kills without a checkpoint would fail a job
        self._outages = 0
        self.errors: list[str] = []

    def kill(self) -> str:
        """Kill a server or a run. Returns a description."""
        runs = [run for server in self._servers if (run := server.run())]
        written = self._work.checkpoints()
        if runs and written > self._checkpoints and self._moments.random() < 0.5:
            self._checkpoints = written
            with contextlib.suppress(psutil.NoSuchProcess):
                self._moments.choice(runs).kill()
            return "killed a run"
        server = self._moments.choice(self._servers)
        server.kill()
        server.start()
        return "killed a server"

    def outage(self) -> str:
        """Stop the database for a while. Returns a description."""
        assert self._postgres is not None
        self._outages += 1
        hard = self._outages % 2 == 0
        (self._postgres.kill if hard else self._postgres.stop)()
        until = time.monotonic() + self._outage
        while time.monotonic() < until:
            for server in self._servers:
                self.errors += _refusals(server.url, self._work.batch)
            time.sleep(1)
        self._postgres.start()
        return f"{'killed' if hard else 'stopped'} PostgreSQL for {self._outage:g} s"


def main() -> None:
    """Submit the work, inject faults, and check the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of servers and runs")
    parser.add_argument("--lines", type=int, default=4000)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=0, help="distillation jobs beside the batch")
    parser.add_argument("--images", type=int, default=640, help=f"budget of each job, a multiple of {STEP}")
    database = parser.add_mutually_exclusive_group()
    database.add_argument("--database", help="PostgreSQL URL; SQLite if neither is given")
    database.add_argument("--postgres", action="store_true", help="start a PostgreSQL")
    parser.add_argument("--outages", type=int, default=0, help="of that PostgreSQL")
    parser.add_argument("--outage", type=float, default=60.0, help="seconds of each")
    parser.add_argument("--longest", type=float, default=1.0, help="maximum random delay of a fault in seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/soak-jobs"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    if arguments.outages and not arguments.postgres:
        parser.error("--outages needs --postgres")
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"--out {arguments.out} is not empty; name a new folder, or remove that one")
    arguments.out.mkdir(parents=True, exist_ok=True)
    moments = random.Random(arguments.seed)
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(running(_programs())) if arguments.postgres else None
        url = postgres.url if postgres else arguments.database
        servers = [Server(arguments.out, url) for _ in range(arguments.servers)]
        for server in servers:
            server.start()
            stack.callback(server.kill)
        client = openai.OpenAI(base_url=f"{servers[0].url}/v1", api_key="none", max_retries=0)
        work = Work(client, arguments.lines, arguments.jobs, arguments.images)
        faults = Faults(servers, postgres, work, moments, arguments.outage)
        kinds: list[Callable[[], str]] = [faults.kill] * arguments.kills + [faults.outage] * arguments.outages
        moments.shuffle(kinds)
        for share, fault in zip(sorted(moments.random() for _ in kinds), kinds, strict=True):
            met = work.reach(share)
            time.sleep(moments.uniform(0, arguments.longest))
            print(f"{fault()}; before it: {met}", flush=True)
        work.reach(1.0)
        if errors := [*faults.errors, *work.errors()]:
            sys.exit("\n".join(errors))
    lived = f"{arguments.kills} kills and {arguments.outages} outages"
    students = f"; {arguments.jobs} jobs: each has its student" if arguments.jobs else ""
    print(f"{lived}, {arguments.lines} lines: each is there once{students}")


def _refusals(url: str, batch: str) -> Iterator[str]:
    """Yield wrong answers of a server while its database is unavailable."""
    again = {"input_file_id": "file-any", "endpoint": ENDPOINT, "completion_window": "24h"}
    for answer in (httpx.get(f"{url}/v1/batches/{batch}"), httpx.post(f"{url}/v1/batches", json=again)):
        if answer.status_code != 503 or "retry-after" not in answer.headers:
            yield f"{answer.request.method} during an outage: {answer.status_code} {answer.text}"
    if (answer := httpx.post(f"{url}{ENDPOINT}", json=IMAGE, timeout=60)).status_code != 200:
        yield f"an image during an outage: {answer.status_code} {answer.text}"


def _programs() -> Path:
    found = programs()
    if found is None:
        sys.exit("PostgreSQL is not installed (Debian: postgresql)")
    return found


def _ended(job: FineTuningJob) -> bool:
    return job.status in ("succeeded", "failed", "cancelled")


def _seen(job: FineTuningJob) -> int:
    seen: int = job.images_seen  # type: ignore[attr-defined]  # ours
    return seen


if __name__ == "__main__":
    main()
