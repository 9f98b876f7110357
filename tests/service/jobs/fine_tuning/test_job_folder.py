"""The files of a job, read while its run writes them."""

import json
import os
from pathlib import Path

from commands import GARBAGE

from service.jobs.fine_tuning.job_folder import JobFolder


def run_in(path: Path) -> JobFolder:
    """The folder of a job whose run has no files yet."""
    folder = JobFolder(path)
    folder.run.mkdir()
    return folder


def test_a_line_is_returned_once_though_a_resumed_run_writes_it_again(tmp_path):
    folder = run_in(tmp_path)
    log = folder.run / "metrics.jsonl"
    log.write_text('{"images": 8, "gap": 1}\n{"images": 16, "gap": 2}\n{"imag')
    (folder.run / "alarms.jsonl").write_text('{"name": "collapse", "images": 16, "message": "less guidance"}\n')
    found = list(folder.new_lines())
    assert [(line.kind, line.images) for line in found] == [("metrics", 8), ("metrics", 16), ("alarm", 16)]
    assert list(folder.new_lines()) == []
    log.write_text('{"images": 8, "gap": 1}\n{"images": 16, "gap": 2.5}\n{"images": 24, "gap": 3}\n')
    assert [line.images for line in folder.new_lines()] == [24]
    (folder.run / "evaluations.jsonl").write_text(json.dumps({"images": 16, "overall": 0.5}) + "\n")
    assert [line.kind for line in folder.new_lines()] == ["evaluation"]
    assert folder.metrics(16) == {"gap": 2.5, "overall": 0.5}
    assert folder.metrics(20) == {"gap": 2.5}


def test_invalid_lines_of_a_log_are_skipped(tmp_path):
    folder = run_in(tmp_path)
    whole = {"metrics": {"gap": 1}, "evaluations": {"overall": 0.5}, "alarms": {"name": "collapse", "message": "less"}}
    for name, values in whole.items():
        line = json.dumps({"images": 8, **values}).encode() + b"\n"
        (folder.run / f"{name}.jsonl").write_bytes(
            GARBAGE + line + b'{"images": 9, "gap": 1e999, "name": 5}\n' + GARBAGE
        )
    found = list(folder.new_lines())
    assert [(line.kind, line.images) for line in found if line.images == 8] == [
        ("metrics", 8),
        ("evaluation", 8),
        ("alarm", 8),
    ]
    assert {line.images for line in found} == {8, 9}
    assert all(line.values["gap"] is None for line in found if line.images == 9)
    assert folder.metrics(8) == {"gap": 1, "overall": 0.5}
    assert folder.results().splitlines()[1].startswith("8,1")
    (folder.run / "config.yaml").write_bytes(b"\xff: [")
    assert folder.budget() is None
    (folder.run / "config.yaml").write_text("images: 13\nbatch: 8\n")
    assert folder.budget() == 16  # whole batches


def test_only_new_lines_of_a_growing_log_are_read(tmp_path):
    folder = run_in(tmp_path)
    log = folder.run / "metrics.jsonl"
    lines = [json.dumps({"images": images, "gap": "x" * 60_000}) + "\n" for images in (8, 16, 24)]
    log.write_text("".join(lines[:2]))
    assert [line.images for line in folder.new_lines()] == [8, 16]
    with log.open("r+") as file:
        file.write("?" * (len(lines[0]) - 1))  # a second read would find no line here
        file.seek(0, os.SEEK_END)
        file.write(lines[2][:-1])
    assert list(folder.new_lines()) == []  # half a line
    with log.open("a") as file:
        file.write("\n")
    assert [line.images for line in folder.new_lines()] == [24]
    assert [folder.metrics(images)["gap"][:1] for images in (15, 16, 20, 24)] == ["x"] * 4
    assert folder.metrics(7) == {}


def test_results_have_one_row_for_each_number_of_images(tmp_path):
    folder = run_in(tmp_path)
    (folder.run / "metrics.jsonl").write_text(
        '{"images": 8, "gap": 1}\n{"images": 16, "gap": 2}\n{"images": 8, "gap": 3}\n'
    )
    (folder.run / "evaluations.jsonl").write_text('{"images": 16, "overall": 0.5}\n')
    assert len(list(folder.new_lines())) == 3
    assert folder.results().splitlines() == ["step,gap,overall", "8,3,", "16,2,0.5"]
