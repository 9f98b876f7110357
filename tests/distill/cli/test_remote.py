"""`distill submit`, `jobs`, `logs` and `cancel` against a real server."""

import re

import httpx
import pytest
from fine_tuning import PROMPTS, server
from receiver import receiving
from running import serving
from typer.testing import CliRunner, Result
from worker_threads import worker_threads

from distill.cli import app, remote
from distill.errors import RemoteError, ServerUnavailableError
from service.app import create_app
from service.engine.simulator import Simulator
from service.settings import Settings

KEY = "key-of-ann-in-tests"


def distill(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def test_a_job_from_the_shell_is_followed_to_its_student(teacher, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(PROMPTS)
    with server(tmp_path / "data", {"tiny": str(teacher)}) as url:
        monkeypatch.setenv("DISTILL_URL", url)
        words = ["--teacher", "tiny", "--preset", "scenes-debug", "--images", "16", "--suffix", "shell", "--follow"]
        sets = ["--set", "batch=8", "--set", "log_every=8"]
        done = distill("submit", str(prompts), *words, *sets)
        assert done.exit_code == 0, done.output
        name = re.search(r"ftjob-\w+", done.output)[0]
        assert f"The student is ft:tiny:shell:{name.removeprefix('ftjob-')}." in done.output
        listed = distill("jobs").output
        assert name in listed
        assert "16 / 16" in listed
        lines = distill("logs", name).output.splitlines()
        assert [line.split("  ")[1] for line in lines if "gap" in line] == [
            "Images seen: 8 of 16",
            "Images seen: 16 of 16",
        ]
        said = ("Validating the file", "usually draws blur or noise", "The job is queued.", "The job is running.")
        assert all(words in line for line, words in zip(lines, said, strict=False))
        refused = distill("cancel", name)
        assert isinstance(refused.exception, RemoteError)
        assert "succeeded already (400)" in str(refused.exception)

        endless = ["--teacher", "tiny", "--preset", "scenes-debug", "--images", "1000000"]
        name = re.match(r"ftjob-\w+", distill("submit", str(prompts), *endless).output)[0]
        said = distill("cancel", name).output
        assert said in (f"{name} is cancelled.\n", f"{name} is still running and will stop.\n")
        followed = distill("logs", name, "--follow")
        assert followed.exit_code == 1
        assert f"error: {name} cancelled" in followed.output
        assert "The job is cancelled." in followed.output


def test_a_refusal_of_the_server_is_one_sentence(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    settings = Settings(data=tmp_path / "data", http={"api_keys": (KEY,)})
    with serving(create_app(settings, worker_threads(Simulator()))) as url:
        for key, words, said in [
            ("key-of-bob-in-tests", ["jobs"], "API key"),
            (KEY, ["submit", str(prompts), "--set", "rnak=8"], "distillation.rnak is not supported"),
            (KEY, ["submit", str(prompts), "--teacher", "none"], "there is no teacher 'none'"),
            (KEY, ["submit", str(tmp_path / "other.txt")], "other.txt cannot be read"),
            (KEY, ["logs", "ftjob-none", "--follow"], "there is no job"),
        ]:
            refused = distill(*words, "--url", url, "--key", key)
            assert isinstance(refused.exception, RemoteError), refused.output
            assert said in str(refused.exception)
        kept = httpx.get(f"{url}/v1/files", headers={"authorization": f"Bearer {KEY}"}).json()
        assert kept["data"] == []  # no file of a refused job remains


@pytest.mark.parametrize("status", [502, 503, 504])
def test_requests_are_retried_while_a_proxy_has_no_server(status, monkeypatch):
    monkeypatch.setattr(remote, "RECONNECT_SECONDS", 0.0)
    with receiving(status) as proxy:
        refused = distill("cancel", "ftjob-1", "--url", proxy.url)
    assert isinstance(refused.exception, ServerUnavailableError)
    assert f"status {status}" in str(refused.exception)


def test_an_unavailable_server_is_retried_and_then_named(monkeypatch):
    monkeypatch.setattr(remote, "RECONNECT_SECONDS", 0.0)
    for words in (["jobs"], ["logs", "ftjob-1", "--follow"]):
        for url in ("http://127.0.0.1:1", "127.0.0.1"):
            refused = distill(*words, "--url", url)
            assert isinstance(refused.exception, ServerUnavailableError)
            assert f"no server answers at {url}" in str(refused.exception)
    assert "is not a server address" in str(distill("jobs", "--url", "http://[::").exception)
