"""A short form of the soak script: servers are killed during a batch, and each line is in the output once."""

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
    soak(tmp_path, "--kills", "1", "--lines", "120", "--longest", "0.2")


def test_two_servers_answer_every_line_once_though_one_is_killed_and_postgresql_twice_away(tmp_path):
    if postgres.programs() is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    troubles = ("--kills", "1", "--outages", "2", "--outage", "1", "--longest", "0.2")
    soak(tmp_path, *troubles, "--lines", "120", "--servers", "2", "--postgres")
