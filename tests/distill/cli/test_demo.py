"""`make demo` with a budget in seconds: what it writes, that it resumes, and that it repeats no finished step."""

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from commands import signal_once
from PIL import Image
from typer.testing import CliRunner, Result

from distill.cli.demo import demo
from distill.report.run_state import read_state

SMALL = (
    "batch=8",
    "prompts.max_count=16",
    "cadence.log=8",
    "cadence.sample=100000",
    "evaluation.evaluator=none",
)


@pytest.fixture(autouse=True)
def _own_handler() -> Iterator[None]:
    """The demo handles SIGTERM to the end of its process."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def invoke(*words: str) -> Result:
    """Run the demo in this process, which has its libraries loaded."""
    app = typer.Typer()
    app.command()(demo)
    return CliRunner().invoke(app, words)


def test_it_continues_what_was_stopped_and_does_nothing_twice(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = f"--out {tmp_path} --exit --port {port} --seconds 0 --per-task 1 --steps 2".split()
    words = [*options, *(f"--set={each}" for each in SMALL)]

    with signal_once((tmp_path / "metrics.jsonl").exists, signal.SIGTERM):
        stopped = invoke(*words, "--set=images=100000")
    assert stopped.exit_code == 128 + signal.SIGTERM
    assert "which are saved" in stopped.output
    assert not (tmp_path / "student").exists()
    images = read_state(tmp_path).images
    words.append(f"--set=images={images + 8}")

    whole = invoke(*words)
    assert whole.exit_code == 0, whole.output
    for picture in ("shipped-student.png", "teacher-vs-student.png", "first-image.png"):
        Image.open(tmp_path / picture).verify()
    assert whole.stdout.splitlines()[-1].startswith(f"Next: curl http://127.0.0.1:{port}/v1/images/generations")

    def made() -> dict[Path, int]:
        files = [tmp_path / "evaluation.txt", *tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.png")]
        return {path: path.stat().st_mtime_ns for path in files}

    before = made()
    monkeypatch.setenv("SERVICE_ENGINE__MAX_BATCH", "none")  # a server that starts was seen
    again = invoke(*words)
    assert (tmp_path / "evaluation.txt").read_text() in again.stdout
    assert str(again.exception) == f"the server ended with status 2; is http://127.0.0.1:{port} taken?"
    assert made() == before


@pytest.mark.parametrize("wrong", ["--port=70000", "--per-task=0", "--steps=-1", "--seconds=-1", "--per-task=many"])
def test_wrong_numbers_are_refused_before_anything_is_made(wrong, tmp_path):
    refused = invoke("--out", str(tmp_path / "out"), wrong)
    assert refused.exit_code == 2
    assert f"'{wrong.partition('=')[0]}'" in refused.stderr
    assert not (tmp_path / "out").exists()
