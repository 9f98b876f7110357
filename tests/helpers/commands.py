"""The `distill` command: in this process, which has its libraries loaded, or as one of its own, to be stopped."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest
from typer.testing import CliRunner, Result

from distill.cli import app

# Lines that no log of a run holds, but a damaged disk or another program may leave in one.
GARBAGE = b'\xff\xfe\n5\nnull\n[1]\n{}\n{"images": "x"}\n{"images": 1e999}\n{"images": -8}\n' + b"[" * 100_000 + b"\n"


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def start(*words: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "distill.cli", *words], text=True, **options)


def until(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Wait for a running process to get there; its end is a failure."""
    while not reached():
        with suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended early with status {process.wait(0.05)}")
