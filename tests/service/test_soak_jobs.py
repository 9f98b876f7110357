"""The soak script in its short form: servers killed while they work on a batch, and every line once in its output."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import postgres

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak_jobs.py"


def soak(out: Path, *arguments: str) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(out / "soak"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_killed_server_answers_every_line_once(tmp_path):
    soak(tmp_path, "--kills", "2", "--lines", "300")


def test_two_servers_on_postgresql_answer_every_line_once_though_one_is_killed(tmp_path):
    binaries = postgres.programs()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    with postgres.running(binaries) as database:
        soak(tmp_path, "--kills", "1", "--lines", "300", "--servers", "2", "--database", database.url)
