"""`make demo`: generate, distill, evaluate and serve in one command. Completed steps are not repeated."""

import base64
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import httpx2
import typer

from distill.cli import main
from distill.cli.console import results_to
from distill.cli.options import Overrides
from distill.files import atomic_write

PROMPT = "a photo of a red circle to the left of a blue square"
SHOWN = (PROMPT, "three green stars", "a purple heart", "a yellow ring above a pink cross", "a star and a diamond")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for all that is made.", file_okay=False)] = Path("runs/demo"),
    overrides: Overrides = None,
    seconds: Annotated[int, typer.Option(help="Seconds to distill; 0 takes the preset's images.", min=0)] = 270,
    per_task: Annotated[int, typer.Option(help="Prompts per task in the evaluation.", min=1)] = 16,
    steps: Annotated[int, typer.Option(help="Teacher's sampling steps in the evaluation.", min=1)] = 28,
    port: Annotated[int, typer.Option(help="Port of the server.", min=1, max=65535)] = 8000,
    ends: Annotated[bool, typer.Option("--exit", help="Exit instead of serving until Ctrl-C.")] = False,
) -> None:
    """Generate with the shipped student, distill another for a short time, evaluate it, and serve it until Ctrl-C."""
    address = f"http://127.0.0.1:{port}"
    signal.signal(signal.SIGTERM, _exit_on_signal)

    grid = out / "shipped-student.png"
    if not grid.exists():
        print("The shipped student generates an image of each of these prompts in one network evaluation:")
        print("".join(f"  {prompt}\n" for prompt in SHOWN), end="", flush=True)
        _distill("generate", *SHOWN, "--out", str(out / "shipped-student"), "--grid", str(grid))

    # The same command resumes a stopped run and does nothing for a finished one.
    print("\nNow a new student is distilled from the shipped teacher:", flush=True)
    budget = ("--seconds", str(seconds)) if seconds else ()
    _distill("run", "demo", "--out", str(out), *budget, *(f"--set={override}" for override in overrides or []))
    picture, metrics = out / "teacher-vs-student.png", out / "evaluation.txt"
    if not (picture.exists() and metrics.exists()):
        words = ("evaluate", "--student", str(out / "student"), "--picture", str(picture))
        options = ("--per-task", str(per_task), "--steps", str(steps))
        with atomic_write(metrics) as made, made.open("w") as file, results_to(file):
            _distill(*words, *options)
    print(metrics.read_text())

    logs = {"SERVICE_OBSERVABILITY__LOG_FORMAT": "text", "SERVICE_OBSERVABILITY__LOG_LEVEL": "warning"}
    serve = ("serve", "--model", str(out / "student"), "--port", str(port))
    with suppress(KeyboardInterrupt), _process("service.cli", *serve, env=os.environ | logs) as server:
        _wait_until_ready(server, address)
        image = out / "first-image.png"
        image.write_bytes(_generate(PROMPT, address))
        print(f"Teacher against student: {picture}; the server's image of {PROMPT!r}: {image}")
        print(f"The server runs on {address}, with a page that draws as you type; docs/service.md describes its API")
        print(f"""Next: curl {address}/v1/images/generations --json '{{"prompt": "two green stars", "seed": 1}}'""")
        sys.stdout.flush()
        if not ends:
            server.wait()


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Turn SIGTERM into an exception, so that child processes are stopped."""
    sys.exit(128 + number)


@contextmanager
def _process(module: str, *arguments: str, **options: Any) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a module as a process; at the end of the block terminate it and wait until it has saved its work."""
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], **options)
    interrupted = False
    try:
        yield process
    except KeyboardInterrupt:
        interrupted = True  # the terminal has sent it Ctrl-C too; a second signal would stop it without saving
        raise
    finally:
        if not interrupted:
            process.terminate()
        process.wait()


def _distill(*words: str) -> None:
    """Run a `distill` command in this process. Exit with its status if it fails."""
    try:
        main(words)
    except SystemExit as ended:
        if ended.code:
            raise


def _wait_until_ready(server: "subprocess.Popen[bytes]", address: str) -> None:
    while True:
        if server.poll() is not None:
            sys.exit(f"the server ended with status {server.returncode}; is {address} taken?")
        with suppress(httpx2.HTTPError):
            if httpx2.get(f"{address}/readyz", timeout=2).is_success:
                return
        time.sleep(0.2)


def _generate(prompt: str, address: str) -> bytes:
    fields = {"prompt": prompt, "size": "auto", "seed": 1}
    answer = httpx2.post(f"{address}/v1/images/generations", json=fields, timeout=60).raise_for_status()
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


if __name__ == "__main__":
    typer.run(demo)
