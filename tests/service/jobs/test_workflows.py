"""Workflows continue after a kill, a shutdown, and on other servers."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from dbos import DBOS

from service.jobs.jobs import Jobs
from service.jobs.workflows import KEPT_SECONDS
from service.settings import Settings

KILLED = """
import os, pathlib, signal, sys
from service.jobs.jobs import Jobs
from service.settings import Settings

folder = pathlib.Path(sys.argv[1])
jobs = Jobs(folder, Settings())

def count(key):
    def first():
        with open(folder / "steps", "a") as file:
            file.write("first ")
        return "kept"
    jobs.workflows.step("first", first)
    os.kill(os.getpid(), signal.SIGKILL)

jobs.workflows.define("count", count, 1)
jobs.start()
jobs.workflows.begin("count", "one")
signal.pause()
"""


@pytest.fixture
def jobs_of(tmp_path) -> Iterator[Callable[[], Jobs]]:
    """Creates `Jobs` in one folder, not started yet, and stops the last one unless the test did."""
    made: list[Jobs] = []

    def make() -> Jobs:
        made.append(Jobs(tmp_path, Settings(jobs={"takeover_seconds": 0.5})))
        return made[-1]

    yield make
    if made and made[-1].open:
        made[-1].stop()


def test_a_workflow_of_a_killed_process_continues_without_repeating_a_step(jobs_of, tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    jobs = jobs_of()
    steps = tmp_path / "steps"
    ended = threading.Event()

    def count(key: str) -> None:
        assert key == "one"
        assert jobs.workflows.step("first", lambda: steps.write_text("again")) == "kept"
        ended.set()

    jobs.workflows.define("count", count, 1)
    jobs.start()
    assert ended.wait(30)
    jobs.stop()
    assert steps.read_text() == "first "


def test_a_stopped_workflow_continues_at_the_next_start(jobs_of):
    began, ended = threading.Event(), threading.Event()

    def wait(key: str) -> None:
        began.set()
        jobs.workflows.wait(3600)

    jobs = jobs_of()
    jobs.workflows.define("wait", wait, 1)
    jobs.start()
    jobs.workflows.begin("wait", "one")
    jobs.workflows.begin("wait", "one")  # starts only once
    assert began.wait(30)
    jobs.stop()

    jobs = jobs_of()
    jobs.workflows.define("wait", lambda key: ended.set(), 1)
    jobs.start()
    assert ended.wait(30)
    jobs.stop()


def test_a_server_only_runs_the_workflows_that_it_is_set_up_for(jobs_of):
    ran: list[str] = []
    done = threading.Event()

    def start(runs: bool) -> Jobs:
        def note(key: str) -> None:
            ran.append(key)
            done.set()

        jobs = jobs_of()
        jobs.workflows.define("heavy", note, 1, runs=runs)
        jobs.workflows.define("light", note, 1)
        jobs.start()
        return jobs

    jobs = start(runs=False)
    jobs.workflows.begin("heavy", "one")
    for key in ("two", "three", "four"):  # each is taken from the queues in a later poll
        done.clear()
        jobs.workflows.begin("light", key)
        assert done.wait(30)
    jobs.stop()
    assert ran == ["two", "three", "four"]

    done.clear()
    jobs = start(runs=True)
    assert done.wait(30)
    assert ran[3:] == ["one"]
    jobs.workflows.sweep(int(time.time()))
    assert len(DBOS.list_workflows()) == 4
    later = int(time.time()) + KEPT_SECONDS + 60
    while DBOS.list_workflows():  # the end of the last one is recorded after it has returned
        jobs.workflows.sweep(later)
    jobs.stop()
