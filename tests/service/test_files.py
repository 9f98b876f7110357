"""Files are complete or absent."""

import os
import stat
from pathlib import Path

import pytest

from service.files import PRIVATE, atomic_write, flush_folder


@pytest.mark.parametrize(("mode", "kept"), [(0o666, 0o640), (PRIVATE, 0o600)])
def test_a_file_is_replaced_atomically_and_has_its_mode(tmp_path, mode, kept):
    path = tmp_path / "file"
    path.write_text("old")
    before = os.umask(0o027)
    try:
        with atomic_write(path, mode) as file:
            file.write(b"new")
            file.flush()
            assert path.read_text() == "old"
    finally:
        os.umask(before)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == kept
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_file_system_that_cannot_flush_folders_is_accepted():
    flush_folder(Path("/proc"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fill():
        with atomic_write(path) as file:
            file.write(b"new")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
