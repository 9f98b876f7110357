"""The `distill` command in this process, which has its libraries loaded."""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from typer.testing import CliRunner, Result

from distill.cli import app

# Lines that no log of a run holds, but a damaged disk or another program may leave in one.
GARBAGE = b'\xff\xfe\n5\nnull\n[1]\n{}\n{"images": "x"}\n{"images": 1e999}\n{"images": -8}\n' + b"[" * 100_000 + b"\n"


def invoke(*words: str, input: str | None = None) -> Result:
    return CliRunner().invoke(app, list(words), input)


@contextmanager
def signal_once(reached: Callable[[], bool], number: int) -> Iterator[None]:
    """Send a signal to this process as soon as `reached` returns true during the block."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            if reached():
                os.kill(os.getpid(), number)
                break

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


def until(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Wait until a condition holds while a process runs; fail if the process ends."""
    while not reached():
        with suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended early with status {process.wait(0.05)}")
