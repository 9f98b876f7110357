"""Atomic writes of files and folders, and the recovery after a kill."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.errors import CheckpointError
from distill.files import _left, append_line, atomic_write, atomic_write_text, flush, reason
from distill.training import checkpoint
from distill.training.run_lock import run_lock

ENDED = 2**22 + 1  # the id of no process: Linux has none above 2^22


def test_a_kill_between_two_renames_leaves_the_older_state(tmp_path):
    """`save` replaces a state of the same name; the next lock of the folder restores the older state.

    It also removes a partly written state of another name, unless its process lives.
    """
    folder = tmp_path / "checkpoints" / checkpoint.state_name(1)
    checkpoint.save(folder, {"x": torch.zeros(9)}, {"images": 1})
    folder.rename(folder.with_name(f".{folder.name}.distill-old"))
    partial, written = (folder.with_name(f".{7:012d}.{process}.distill-partial") for process in (ENDED, os.getppid()))
    for path in (partial, written):
        path.mkdir()
        (path / "state.safetensors").touch()
    with run_lock(tmp_path):
        assert checkpoint.latest(folder.parent) == folder
    assert not partial.exists()
    shutil.rmtree(written)
    checkpoint.save(folder, {"x": torch.ones(9)}, {"images": 1})
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert checkpoint.load(folder)[0]["x"][0] == 1


def test_nothing_of_anyone_elses_is_renamed_or_removed_in_a_run_folder(tmp_path, tmp_path_factory):
    others = [tmp_path / name for name in (".notes.old", "notes", ".notes.partial", "sub/.x.old", "sub/x")]
    (tmp_path / "embeddings").symlink_to(tmp_path_factory.mktemp("shared"))
    others += [tmp_path / "embeddings" / f".index.json.{ENDED}.distill-partial"]
    others += [tmp_path / "checkpoints" / name for name in ("0001-mine/a.txt", "2024/a.txt", f"{1:012d}/a.txt")]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    with run_lock(tmp_path):
        atomic_write_text(tmp_path / "notes", "notes")
        for images in (2, 3, 4):
            checkpoint.save(tmp_path / "checkpoints" / checkpoint.state_name(images), {}, {"images": images})
        checkpoint.prune(tmp_path / "checkpoints" / checkpoint.state_name(4), 1)
    assert [path.read_text() for path in others] == [path.name for path in others]
    with pytest.raises(CheckpointError, match=r"a\.txt is in the place of a checkpoint"):
        checkpoint.save(tmp_path / "checkpoints" / checkpoint.state_name(1), {}, {"images": 1})
    assert len(checkpoint.states(tmp_path / "checkpoints")) == 2


def test_a_file_that_is_a_link_is_written_through_and_a_folder_takes_no_file_s_place(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    atomic_write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    with pytest.raises(FileExistsError), atomic_write(tmp_path / "target") as made:
        made.mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"target", "link"}


def test_two_processes_that_write_one_folder_at_once_do_not_mix_their_files(tmp_path):
    """The first process is killed later, and the second one replaces a complete folder."""
    text = """import sys, pathlib, distill.files
with distill.files.atomic_write(pathlib.Path(sys.argv[1])) as made:
    made.mkdir(); (made / "theirs").touch(); print(flush=True); input()"""
    path = tmp_path / "student"
    with subprocess.Popen([sys.executable, "-c", text, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for name in ("first", "second"):
            with atomic_write(path) as made:
                made.mkdir()
                (made / name).touch()
            assert [each.name for each in path.iterdir()] == [name]
        left = next(tmp_path.glob(".*"))
        assert [each.name for each in left.iterdir()] == ["theirs"]
        process.kill()
    _left.cache_clear()  # as in a new process
    with atomic_write(path) as made:
        made.mkdir()
    assert [each.name for each in tmp_path.iterdir()] == ["student"]


def test_a_file_system_that_cannot_flush_folders_is_no_error():
    flush(Path("/proc"))


def test_a_full_disk_is_an_error_with_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as appended:
        append_line(Path("/dev/full"), {"images": 8})
    assert appended.value.filename == "/dev/full"
    with pytest.raises(OSError, match="No space left") as written, atomic_write(tmp_path / "a"):
        Path("/dev/full").write_text("text")
    assert written.value.filename == str(tmp_path / "a")
    assert str(reason(written.value)) == "No space left on device"


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    atomic_write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(tmp_path / "a.txt", "new \udcff")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
