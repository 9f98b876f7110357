"""A real Ray Serve, started by the user's command. Ray's processes take most of the minute and a half."""

import base64
import importlib.util
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
ROUTE = "{}/v1/images/generations"
HEADER = "serve_multiplexed_model_id"
PATIENT = {  # Ray's own limits, for a machine that others use too
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "600",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "600",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "5",
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 << 20),
}


@pytest.fixture
def students(tmp_path):
    """Two students and two adapters in the form that simulators accept."""
    for name in ("second", "third", "sketch", "ink"):
        (tmp_path / name).mkdir()
    for name in ("second", "third"):
        (tmp_path / name / "onestep.json").write_text(json.dumps({"name": "any"}))
    for name in ("sketch", "ink"):
        (tmp_path / name / "pytorch_lora_weights.safetensors").touch()
    return tmp_path


@contextmanager
def serving(*arguments: str, said="serving on", **settings: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a server under Ray for the duration of the block. Yields its URL and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        settings["http__port"] = str(free.getsockname()[1])
    environment = os.environ | PATIENT | {f"SERVICE_{name.upper()}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "service.cli", "ray", "--cpus", "0.1", *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as it:
        try:
            told = []
            for line in it.stderr:
                told.append(line)
                if said in line:
                    break
            else:
                pytest.fail("".join(told))
            threading.Thread(target=it.stderr.read, daemon=True).start()  # so that the pipe never fills
            yield f"http://127.0.0.1:{settings['http__port']}", it
        finally:
            it.terminate()
            it.wait(600)


def generate(url: str, seed: int, n: int = 1, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    """Request an image; every answer must be one."""
    body = {"prompt": "a red circle", "seed": seed, "n": n, **more}
    answer = httpx.post(ROUTE.format(url), json=body, headers=headers, timeout=600)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == n
    return answer


def replica(answer: httpx.Response) -> str:
    return answer.headers["x-replica"]


def color(answer: httpx.Response) -> tuple[int, ...]:
    """Return the color of a simulator's image."""
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    return image.getpixel((0, 0))


def of_both(ask) -> list[httpx.Response]:
    """Return the answers of two replicas to the same request."""
    answers: dict[str, httpx.Response] = {}
    for _ in range(1000):
        answer = ask()
        answers[replica(answer)] = answer
        if len(answers) == 2:
            return list(answers.values())
    raise AssertionError(f"{list(answers)} alone answered")


def test_replicas_come_with_the_queue_agree_and_leave_without_losing_a_request(students):
    scale = [
        "--max-replicas",
        "2",
        "--target-queue-seconds",
        "0.05",
        "--scale-up-seconds",
        "0",
        "--scale-down-seconds",
        "5",
    ]
    settings = {
        "engine__devices": "simulator",
        "engine__max_batch": "1",
        "engine__result_cache_bytes": "0",
        "data": "none",
        "engine__max_queued_images": "100",
    }
    settings |= {"models_folder": str(students), "engine__on_demand_students": "1", "engine__on_demand_adapters": "2"}
    settings |= dict.fromkeys(("engine__request_timeout_seconds", "engine__heartbeat_timeout_seconds"), "600")
    with serving(*scale, **settings) as (url, process), ThreadPoolExecutor(8) as pool:
        seeds = itertools.count(100, 10)
        seen = {replica(generate(url, 0))}
        while len(seen) < 2:
            seen |= set(pool.map(lambda seed: replica(generate(url, seed, n=10)), itertools.islice(seeds, 16)))

        one, other = of_both(lambda: generate(url, 7))
        assert one.json()["data"] == other.json()["data"]
        link = generate(url, 8, response_format="url").json()["data"][0]["url"]
        assert len({shown.content for shown in of_both(lambda: httpx.get(link).raise_for_status())}) == 1

        for name in ("second", "third", "second"):
            generate(url, 7, headers={HEADER: name}, model=name)
        for wish in ("simulator+sketch", "second+sketch", "second+ink", "simulator+sketch"):
            model, adapter = wish.split("+")
            headers = {HEADER.replace("_", "-"): wish}  # the form that nginx lets through
            lora = {"name": adapter, "scale": 0.5}
            adapted = generate(url, 7, headers=headers, model=model, lora=lora)
            assert color(adapted) == color(generate(url, 507))
        nowhere = {"prompt": "a", "lora": {"name": "oil"}}
        assert httpx.post(ROUTE.format(url), json=nowhere).json()["error"]["code"] == "adapter_not_found"
        assert httpx.post(ROUTE.format(url), json={"prompt": "a", "model": "fourth"}).status_code == 404

        with ThreadPoolExecutor(40) as crowd:
            body = {"prompt": "a red circle", "n": 10}
            answers = [crowd.submit(httpx.post, ROUTE.format(url), json=body, timeout=600) for _ in range(40)]
        refused = [answer.result() for answer in answers if answer.result().status_code != 200]
        assert {answer.status_code for answer in refused} == {429}
        assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)

        pace = threading.Event()  # Ray averages the load over half a minute, which many requests would only heat
        while len({replica(generate(url, next(seeds))) for _ in range(20) if not pace.wait(0.05)}) == 2:
            pass  # one leaves, and nobody who asks meanwhile notices

        answers = [pool.submit(generate, url, seed, n=10) for seed in itertools.islice(seeds, 8)]
        answers[0].result()  # so all are on their way
        process.send_signal(signal.SIGTERM)
        for answer in answers:
            answer.result()
        assert process.wait(600) == 0


def test_it_ends_when_it_is_told_to_while_a_replica_still_waits_for_its_place():
    with serving("--min-replicas", "1", "--cpus", "1000", said="waiting for replicas", engine__devices="simulator") as (
        _,
        process,
    ):
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 0
