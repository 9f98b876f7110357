"""The data folder and its databases are checked before anything starts."""

import contextlib
import os
import sqlite3
from pathlib import Path

import pytest

from service.errors import StartError
from service.jobs.jobs import Jobs
from service.settings import Settings


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/proc", "/dev/null"])
def test_an_unusable_data_folder_is_named(folder):
    with pytest.raises(StartError, match=f"the folder {folder} cannot be created or written"):
        Jobs(Path(folder), Settings())


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"x" * 4096)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"no database" * 1000),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        _overwrite,
    ],
)
@pytest.mark.parametrize("name", ["jobs.sqlite", "workflows.sqlite"])
def test_a_damaged_database_is_named_before_anything_starts(tmp_path, name, damage):
    jobs = Jobs(tmp_path, Settings())
    jobs.prepare()
    jobs.database.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "workflows.sqlite")) as workflows:
        workflows.execute("CREATE TABLE steps (name TEXT)")
    jobs.prepare()
    jobs.database.close()
    damage(tmp_path / name)
    with pytest.raises(StartError, match=f"{name} cannot be used"):
        jobs.prepare()
