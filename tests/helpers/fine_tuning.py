"""Distillation jobs with the real client, on a server in this process."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
from running import serving
from worker_threads import worker_threads

from service.app import create_app
from service.engine.simulator import Simulator
from service.jobs.jobs import Jobs
from service.jobs.tables import JobRow
from service.settings import Settings

TINY = {"preset": "scenes-debug", "images": 480, "batch": 8, "warmup_images": 0, "log_every": 8, "checkpoint_every": 8}


ENDLESS = {**TINY, "images": 1_000_000, "checkpoint_every": 1_000_000, "sample_every": 1_000_000}


PROMPTS = '{"prompt": "a red circle"}\n"a blue square"\n'


SERVE = [sys.executable, "-m", "service.cli", "serve", "--device", "simulator", "--port", "0"]


@contextlib.contextmanager
def server(data: Path, teachers: dict[str, str], **jobs) -> Iterator[str]:
    """Run a server in this process that loads real students beside a simulated one."""
    settings = Settings(data=data, jobs={"teachers": teachers, "takeover_seconds": 1, "nice": 0, **jobs})
    with serving(create_app(settings, worker_threads(Simulator(), device="cpu"))) as url:
        yield url


def upload(client: openai.OpenAI, text: str = PROMPTS, name: str = "prompts.jsonl", purpose="fine-tune") -> str:
    return client.files.create(file=(name, text.encode()), purpose=purpose).id


def submit(client: openai.OpenAI, file: str, knobs: dict, **more):
    return client.fine_tuning.jobs.create(model="tiny", training_file=file, **more, extra_body={"distillation": knobs})


def until(client: openai.OpenAI, job, reached: Callable):
    """Wait until the job has reached a state; fail if it ends in another one."""
    while not reached(job := client.fine_tuning.jobs.retrieve(job.id)):
        assert job.status not in ("succeeded", "failed", "cancelled"), job.error
        threading.Event().wait(0.5)
    return job


def event_messages(client: openai.OpenAI, job) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]


def add_job(jobs: Jobs, number: int, status: str, **more) -> str:
    """Add a job to the database and create its folder. Returns its id."""
    facts = {
        "owner": "ann",
        "model": "tiny",
        "training_file": "file-1",
        "seed": 1,
        "hyperparameters": {"batch_size": 8},
        "distillation": {"preset": "scenes"},
        "result_files": [],
        "created_at": number,
        "starts": 0,
        "images_seen": 8,
    }
    job = JobRow(**facts | {"id": f"ftjob-{number}", "status": status} | more)
    (jobs.folder / "distillations" / job.id / "run" / "checkpoints").mkdir(parents=True)
    with jobs.database.begin() as session:
        session.add(job)
    return job.id
