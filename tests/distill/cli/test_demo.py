"""`make demo` with a budget of seconds: what it promises to leave, to continue, and not to do twice."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import until
from PIL import Image

from distill.cli.demo import main

SMALL = (
    "images=24",
    "batch=8",
    "prompts.max_count=16",
    "cadence.log=8",
    "cadence.sample=100000",
    "cadence.evaluate=100000",
)


def test_it_continues_what_was_stopped_and_does_nothing_twice(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = f"--out {tmp_path} --exit --port {port} --seconds 0 --per-task 1 --steps 2".split()
    command = [sys.executable, "-m", "distill.cli.demo", *options, *(f"--set={each}" for each in SMALL)]

    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(demo, (tmp_path / "metrics.jsonl").exists)
    demo.send_signal(signal.SIGTERM)
    said, _ = demo.communicate()  # returns when no process holds the pipe any more
    assert demo.returncode == 128 + signal.SIGTERM
    assert "which are saved" in said
    assert not (tmp_path / "student").exists()

    whole = subprocess.run(command, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    for picture in ("shipped-student.png", "teacher-vs-student.png", "first-image.png"):
        Image.open(tmp_path / picture).verify()
    assert whole.stdout.splitlines()[-1].startswith(f"Next: curl http://127.0.0.1:{port}/v1/images/generations")

    def made() -> dict[Path, int]:
        files = [tmp_path / "evaluation.txt", *tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.png")]
        return {path: path.stat().st_mtime_ns for path in files}

    before = made()
    refusing = os.environ | {"SERVICE_ENGINE__MAX_BATCH": "none"}  # one that starts was seen
    again = subprocess.run(command, env=refusing, capture_output=True, text=True)
    assert (tmp_path / "evaluation.txt").read_text() in again.stdout
    assert f"the server ended with status 2; is http://127.0.0.1:{port} taken?" in again.stderr
    assert again.returncode == 1
    assert made() == before


@pytest.mark.parametrize("wrong", ["--port=70000", "--per-task=0", "--steps=-1", "--seconds=-1", "--per-task=many"])
def test_wrong_numbers_are_refused_before_anything_is_made(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "out"), wrong])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"argument {wrong.partition('=')[0]}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
