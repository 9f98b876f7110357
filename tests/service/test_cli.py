"""The `fgm-service` command as a process: start, refusal to start, SIGTERM."""

import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest
from running import metric, until

from service import cli
from service.errors import StartError
from service.http.address import bind
from service.settings import SHIPPED_STUDENT

SERVE = [sys.executable, "-m", "service.cli", "serve"]


FOLDERS = ["fgm-artifacts", "fgm-choices"]  # temporary ones, of a server without a data folder


def with_folders(place):
    """Return the environment of a server whose temporary folders are all in one place."""
    return {"TMPDIR": str(place), "SERVICE_ENGINE__TUNING_SECONDS": "1"}


def folders(place):
    return sorted(path.name.rpartition("-")[0] for path in place.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_answers_what_was_accepted_then_ends_and_leaves_no_folder(number, tmp_path):
    environment = os.environ | {"SERVICE_ENGINE__MAX_BATCH": "64"} | with_folders(tmp_path)
    command = [*SERVE, "--device", "simulator", "--port", "0", "--set", "engine.max_batch=1"]  # a flag wins
    heeding = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    with (
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heeding) as process,
        contextlib.ExitStack() as cleanup,
    ):
        cleanup.callback(process.kill)
        started = []
        for line in process.stderr:
            started.append(json.loads(line)["message"])
            if found := re.search(r"http://[\d.:]+", line):
                break
        url = found[0]
        assert folders(tmp_path) == FOLDERS
        assert started == [
            "loading scenes-one-step on simulator",
            "setting data = None",  # as for all tests
            "setting engine.devices = simulator",
            "setting engine.max_batch = 1",
            "setting engine.tuning_seconds = 1.0",
            "setting http.port = 0",
            f"serving simulator on simulator at {url}; no API key is required",
        ]
        upload = socket.create_connection(("127.0.0.1", httpx.URL(url).port), 60)
        upload.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{")
        with upload, ThreadPoolExecutor(6) as pool:
            bodies = [{"prompt": "a", "n": 10, "seed": seed} for seed in range(0, 60, 10)]  # all different
            answers = [pool.submit(httpx.post, f"{url}/v1/images/generations", json=body) for body in bodies]
            until(lambda: metric(url, "queued_images") + metric(url, "images_total") >= 50)
            process.send_signal(number)
            refused = http.client.HTTPResponse(upload)  # its body does not come, and holds nothing up
            refused.begin()
            assert (refused.status, refused.headers["connection"]) == (503, "close")
            log = process.stderr.read()
        assert process.wait(30) == 0
        assert folders(tmp_path) == []
        assert [len(answer.result().json()["data"]) for answer in answers] == [10] * 6
        assert "Traceback" not in log
        assert all(json.loads(line)["level"] in ("info", "warning") for line in log.splitlines())


HUNG_STORE = """
import sys, threading
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from service.cli import main

class Store(MemoryFileSystem):
    protocol, store = "hung", {}

    def pipe_file(self, path, value, **options):
        print("the store is asked", file=sys.stderr, flush=True)
        threading.Event().wait()

fsspec.register_implementation("hung", Store)
main()
"""


def test_a_store_that_hangs_keeps_no_server_from_ending():
    environment = os.environ | {"SERVICE_IMAGES__ARTIFACTS": "hung://images", "SERVICE_HTTP__DRAIN_SECONDS": "1"}
    command = [sys.executable, "-c", HUNG_STORE, "serve", "--device", "simulator", "--port", "0"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.:]+", line)))
        with ThreadPoolExecutor(1) as pool:
            body = {"prompt": "a", "response_format": "url"}
            pool.submit(httpx.post, f"{url}/v1/images/generations", json=body, timeout=60)
            assert any("the store is asked" in line for line in process.stderr)
            process.send_signal(signal.SIGTERM)
            try:
                assert process.wait(60) == 0
            finally:
                process.kill()


def test_sigterm_ends_process_1_that_still_starts():
    contained = ["unshare", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*contained, "true"], check=False).returncode:
        pytest.skip("needs the right to make namespaces")
    command = [*contained, sys.executable, "-c", "import service.cli, signal; print(flush=True); signal.pause()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_worker_that_loads_a_model_ends_with_its_server(number, tmp_path):
    profile = tmp_path / "profile.json"
    os.mkfifo(profile)  # reading it takes forever
    command = [*SERVE, "--device", "simulator", "--port", "0", "--data", "none"]
    command += ["--set", f"engine.simulated_profile={profile}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process, profile.open("wb") as written:
        process.send_signal(number)
        assert process.wait(60)
        gone = select.poll()
        gone.register(written, 0)
        assert gone.poll(20_000), "the worker still reads"


def test_a_second_signal_ends_it_at_once_and_leaves_no_folder(tmp_path):
    waits = with_folders(tmp_path) | {
        "SERVICE_ENGINE__BATCHING_WINDOW_SECONDS": "500",
        "SERVICE_ENGINE__REQUEST_TIMEOUT_SECONDS": "500",
        "SERVICE_HTTP__DRAIN_SECONDS": "500",
    }
    command = [*SERVE, "--device", "simulator", "--port", "0"]
    with subprocess.Popen(command, env=os.environ | waits, stderr=subprocess.PIPE, text=True) as process:
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.:]+", line)))
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx.post, f"{url}/v1/images/generations", json={"prompt": "a"}, timeout=500)
            until(lambda: metric(url, "queued_images") == 1)
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            assert isinstance(asked.exception(60), httpx.TransportError)
        assert process.wait(60) in (-signal.SIGTERM, -signal.SIGINT)
    assert folders(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["--model", "nowhere"], {}, "nowhere"),
        (["--model", "mine=nowhere"], {}, "nowhere: there is no such folder"),
        (["--model", "-mine=nowhere"], {}, "-mine=nowhere is not NAME=FOLDER: a name has"),
        (["--model", str(SHIPPED_STUDENT), "--model", str(SHIPPED_STUDENT)], {}, "--model NAME=FOLDER"),
        ([], {"SERVICE_ENGINE__MAX_BATCH": "none"}, "SERVICE_ENGINE__MAX_BATCH"),
        ([], {"SERVICE_HTTP__API_KEYS": "not json"}, "SERVICE_HTTP__API_KEYS"),
        (["--set", "engine.max_batch=0"], {}, "engine.max_batch"),
        (["--set", "engine.max_batsch=8"], {}, "did you mean 'engine.max_batch'?"),
        (["--set", "engine.max_batch"], {}, "key=value"),
        (["--set", "engine=5", "--set", "engine.max_batch=8"], {}, "engine is a group of settings"),
        (["--set", "jobs.teachers.mine=/teacher"], {}, "no setting 'jobs.teachers.mine'; did you mean 'jobs.teachers'"),
        (["--set", "engine.max_batch=none", "--set", 'engine={"cpu_threads": 1}'], {}, "engine.max_batch"),
        ([], {"SERVICE_PORT": "8000"}, "did you mean SERVICE_HTTP__PORT?"),
        (["--set", "http.api_keys=[oops"], {}, "lists are JSON"),
    ],
)
def test_what_keeps_it_from_starting_is_one_sentence(arguments, environment, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fgm-service", "serve", *arguments])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert named in said
    assert "oops" not in said  # a malformed list of keys
    assert len(said.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["fgm-service", "serve", "--port", str(port)])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
    assert capsys.readouterr().err == (
        f"error: http.host and http.port: 127.0.0.1:{port} cannot be used: another process listens there; stop it, or "
        "give another --port\n"
    )


def test_bound_addresses_are_those_of_all_families():
    sockets = bind("localhost", 0)
    with contextlib.ExitStack() as opened:
        names = [opened.enter_context(each).getsockname() for each in sockets]
        assert {name[0] for name in names} <= {"127.0.0.1", "::1"}
        assert len({name[1] for name in names}) == 1  # one port
    with pytest.raises(StartError, match="--host of an address of this machine"):
        bind("192.0.2.1", 0)
