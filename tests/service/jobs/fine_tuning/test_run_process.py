"""The process of a job and its supervisor, and how they end."""

import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest

from service.jobs.fine_tuning.job_folder import JobFolder
from service.jobs.fine_tuning.run_process import RunProcess, environment, run_process
from service.jobs.fine_tuning.workflow import REFUSED

WAITS = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("stopped", flush=True)))
print("began", flush=True)
signal.pause()
"""


SECOND_FAILS = """
import os, signal, sys
if os.environ["RANK"] == "1":
    print("error: what it is\\nand more", file=sys.stderr)
    sys.exit(2)
signal.pause()
"""


MEETS = """
import torch
from accelerate import PartialState
state = PartialState(cpu=True)
met = torch.ones(1)
torch.distributed.all_reduce(met)
print(f"process {state.process_index} of {state.num_processes} has met all {int(met)}")
state.destroy_process_group()
"""


def until(process: RunProcess, reached: Callable[[], bool]) -> None:
    """Wait until a process has reached a state."""
    while not reached():
        with suppress(subprocess.TimeoutExpired):
            process._supervisor.wait(0.02)


def alive(group: int) -> bool:
    """Whether a process of the group runs; zombies do not count."""
    states = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return any(int(line.split()[0]) == group and line.split()[1][0] != "Z" for line in states.splitlines())


def test_jobs_see_only_their_devices(monkeypatch):
    monkeypatch.setenv("SERVICE_HTTP__API_KEYS", '["key-of-ann-in-tests"]')
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment(["cpu"])["CUDA_VISIBLE_DEVICES"] == ""
    assert environment(["cuda:1", "cuda:2"])["CUDA_VISIBLE_DEVICES"] == "1,2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5,6")
    assert environment(["cuda:1", "cuda:2"])["CUDA_VISIBLE_DEVICES"] == "GPU-5,6"
    assert "SERVICE_HTTP__API_KEYS" not in environment(["cpu"])


def test_a_process_is_asked_to_stop(tmp_path):
    folder = JobFolder(tmp_path)
    with run_process([sys.executable, "-c", WAITS], environment(["cpu"]), 0, folder.console) as process:
        until(process, lambda: "began" in folder.log_tail())
        assert process.status() is None
        assert process.stop() == 0
    assert folder.log_tail() == "stopped"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_command_ends_with_a_supervisor_that_is_killed(tmp_path, processes):
    folder = JobFolder(tmp_path)
    with run_process([sys.executable, "-c", WAITS], environment(["cpu"]), 0, folder.console, processes) as process:
        until(process, lambda: "began" in folder.log_tail())
        process._supervisor.kill()
        process._supervisor.wait()
        assert alive(process.pid)
        assert process.status() == 128 + signal.SIGKILL
        until(process, lambda: not alive(process.pid))
    assert folder.log_tail() == "began"


def test_a_process_that_fails_ends_the_others_and_its_error_is_shown(tmp_path):
    folder = JobFolder(tmp_path)
    with run_process([sys.executable, "-c", SECOND_FAILS], environment(["cpu"]), 0, folder.console, 2) as process:
        process._supervisor.wait()
        assert process.status() == REFUSED
        assert not alive(process.pid)
    assert (folder.error(), folder.log_tail()) == ("what it is", "and more")


def test_the_status_is_that_of_the_process_that_failed_first(tmp_path):
    folder = JobFolder(tmp_path)
    script = "import os, signal; os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else exit(1)"
    with run_process([sys.executable, "-c", script], environment(["cpu"]), 0, folder.console, 2) as process:
        process._supervisor.wait()
        assert process.status() == 128 + signal.SIGKILL


def test_two_processes_find_each_other_as_accelerate_does(tmp_path):
    folder = JobFolder(tmp_path)
    with run_process([sys.executable, "-c", MEETS], environment(["cpu", "cpu"]), 0, folder.console, 2) as process:
        process._supervisor.wait()
        assert process.status() == 0, folder.log_tail()
    assert folder.log_tail() == "process 0 of 2 has met all 2"
