"""`make demo` with a budget of seconds: what it promises to leave, to continue, and not to do twice."""

import signal
import socket
import subprocess
import sys

from PIL import Image

SMALL = (
    "images=48",
    "batch=8",
    "prompts.count=16",
    "cadence.log=8",
    "cadence.sample=100000",
    "cadence.evaluate=100000",
)


def test_it_continues_what_was_stopped_and_does_nothing_twice(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = f"--out {tmp_path} --exit --port {port} --per-task 1 --steps 2".split()
    command = [sys.executable, "-m", "distill.demo", *options, *(f"--set={each}" for each in SMALL)]

    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists():
        assert demo.poll() is None
    demo.send_signal(signal.SIGTERM)
    said, _ = demo.communicate()  # returns when no process holds the pipe any more
    assert demo.returncode == 128 + signal.SIGTERM
    assert b"which are saved" in said
    assert not (tmp_path / "student").exists()

    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    for picture in ("teacher-vs-student.png", "first-image.png"):
        Image.open(tmp_path / picture).verify()
    assert first.stdout.splitlines()[-1].startswith(f"Next: curl http://127.0.0.1:{port}/v1/images/generations")

    weights = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert weights == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
