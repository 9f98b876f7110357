"""A run as the service sees it: its knobs are real ones, its process outlives nobody, its logs are read once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from commands import GARBAGE, invoke
from pydantic import ValidationError
from sqlalchemy import select
from typer.main import get_command

from distill.cli import app
from distill.config import load_config
from distill.data.prompts import read_prompts
from service.jobs.database import Database
from service.jobs.fine_tuning.events import EtaEstimator, record_checkpoint, record_log_lines
from service.jobs.fine_tuning.options import DISTILL, KEYS, DistillationOptions, prompts_command, run_command
from service.jobs.fine_tuning.run_folder import Child, JobFolder, LogLine, environment
from service.jobs.fine_tuning.workflow import REFUSED, _refusal
from service.jobs.tables import JobCheckpointRow, JobEventRow, JobRow

EVERYTHING = {
    "images": 64,
    "max_prompts": 8,
    "column": "words",
    "batch": 4,
    "micro_batch": 2,
    "guidance_scale": 3.5,
    "student_lr": 1e-5,
    "fake_lr": 2e-5,
    "warmup_images": 0,
    "decay_images": 32,
    "ema_half_life": 900,
    "precision": "fp32",
    "sizes": [[64, 64], [64, 32]],
    "early_stopping_patience": 2,
    "log_every": 4,
    "sample_every": 8,
    "checkpoint_every": 16,
    "evaluate_every": 32,
}


def test_every_knob_is_a_key_of_a_run():
    assert EVERYTHING.keys() == KEYS.keys()
    asked = DistillationOptions(**EVERYTHING, networks="lora", rank=4, checkpointing=True)
    run = load_config("scenes-debug", asked.overrides())
    assert (run.images, run.batch, run.micro_batch, run.prompts.max_count) == (64, 4, 2, 8)
    assert run.prompts.column == "words"
    assert (run.method.guidance.scale, run.optimizer.student_lr, run.optimizer.fake_lr) == (3.5, 1e-5, 2e-5)
    assert (run.ema_half_life, run.precision, run.early_stopping_patience) == (900, "fp32", 2)
    assert (run.optimizer.warmup_images, run.optimizer.decay_images) == (0, 32)
    assert run.sizes == ((64, 64), (64, 32))
    assert run.cadence.model_dump(include={"log", "sample", "checkpoint", "evaluate"}) == {
        "log": 4,
        "sample": 8,
        "checkpoint": 16,
        "evaluate": 32,
    }
    assert (run.networks.kind, run.networks.rank, run.networks.checkpointing) == ("lora", 4, True)
    assert load_config("sd3-medium-lora", DistillationOptions(rank=8).overrides()).networks.rank == 8
    assert load_config("sd3-medium-lora", DistillationOptions(networks="full").overrides()).networks.kind == "full"


@pytest.mark.parametrize(
    "given", [{"rnak": 3}, {"images": 8, "seconds": 9.0}, {"preset": "../x"}, {"preset": "a.yaml"}, {"batch": 0}]
)
def test_what_is_no_knob_is_refused(given):
    with pytest.raises(ValidationError):
        DistillationOptions(**given)


def test_the_command_is_one_of_distill(tmp_path):
    asked = DistillationOptions(preset="scenes", method="dmd", seconds=9.5, images=None)
    words = run_command(asked, 'a "teacher"', tmp_path / "prompts.txt", 7, tmp_path / "run")
    assert (*words[:3], words[3]) == (*DISTILL, "run")
    parsed = get_command(app).commands["run"].make_context("run", words[4:]).params
    assert parsed["config"] == "scenes"
    assert (parsed["method"], parsed["seconds"], parsed["out"]) == ("dmd", 9.5, tmp_path / "run")
    run = load_config("scenes", parsed["overrides"])
    assert (run.teacher, run.prompts.source, run.seed) == ('a "teacher"', str(tmp_path / "prompts.txt"), 7)


def test_the_column_of_the_prompts_is_that_of_the_job(tmp_path):
    prompts, run = tmp_path / "prompts.CSV", tmp_path / "run"
    prompts.write_text("2024,text\na red circle,a blue square\n")
    asked = DistillationOptions(preset="scenes", column="2024")
    words = run_command(asked, "scenes", prompts, 7, run)
    params = get_command(app).commands["run"].make_context("run", words[4:]).params
    given = load_config("scenes", params["overrides"]).prompts
    assert list(read_prompts(given.source, column=given.column)) == ["a red circle"]
    assert invoke(*prompts_command(asked, prompts)[3:]).exit_code == 0
    assert invoke(*prompts_command(DistillationOptions(preset="scenes", column="2025"), prompts)[3:]).exit_code == 1


def test_jobs_see_their_devices_alone(monkeypatch):
    monkeypatch.setenv("SERVICE_HTTP__API_KEYS", '["key-of-ann-in-tests"]')
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment(["cpu"])["CUDA_VISIBLE_DEVICES"] == ""
    assert environment(["cuda:1", "cuda:2"])["CUDA_VISIBLE_DEVICES"] == "1,2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5,6")
    assert environment(["cuda:1", "cuda:2"])["CUDA_VISIBLE_DEVICES"] == "GPU-5,6"
    assert "SERVICE_HTTP__API_KEYS" not in environment(["cpu"])


PATIENT = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("stopped", flush=True)))
print("began", flush=True)
signal.pause()
"""


def until(child: Child, reached: Callable[[], bool]) -> None:
    """Wait for a process under its supervisor to get there."""
    while not reached():
        with suppress(subprocess.TimeoutExpired):
            child._supervisor.wait(0.02)


def alive(group: int) -> bool:
    """Whether a process of the group runs; one that nobody has waited for yet does not."""
    states = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return any(int(line.split()[0]) == group and line.split()[1][0] != "Z" for line in states.splitlines())


def test_a_process_that_is_let_go_is_asked_to_stop(tmp_path):
    folder = JobFolder(tmp_path / "run")
    with folder.process([sys.executable, "-c", PATIENT], environment(["cpu"]), 0) as child:
        until(child, lambda: "began" in folder.log_tail())
        assert child.status() is None
        assert child.stop() == 0
    assert folder.log_tail() == "stopped"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_supervisor_that_is_killed_takes_its_command_with_it(tmp_path, processes):
    folder = JobFolder(tmp_path / "run")
    with folder.process([sys.executable, "-c", PATIENT], environment(["cpu"]), 0, processes) as child:
        until(child, lambda: "began" in folder.log_tail())
        child._supervisor.kill()
        child._supervisor.wait()
        assert alive(child.pid)
        assert child.status() == 128 + signal.SIGKILL
        until(child, lambda: not alive(child.pid))
    assert folder.log_tail() == "began"


FELLOWS = """
import os, signal, sys
if os.environ["RANK"] == "1":
    print("error: what it is\\nand more", file=sys.stderr)
    sys.exit(2)
signal.pause()
"""


def test_of_several_processes_the_one_that_ends_badly_ends_all_and_says_why(tmp_path):
    folder = JobFolder(tmp_path / "run")
    with folder.process([sys.executable, "-c", FELLOWS], environment(["cpu"]), 0, 2) as child:
        child._supervisor.wait()
        assert child.status() == REFUSED
        assert not alive(child.pid)
    assert (folder.reason(), folder.log_tail()) == ("what it is", "and more")


def test_one_that_lost_its_fellows_does_not_speak_for_them(tmp_path):
    script = "import os, signal; os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else exit(1)"
    with JobFolder(tmp_path / "run").process([sys.executable, "-c", script], environment(["cpu"]), 0, 2) as child:
        child._supervisor.wait()
        assert child.status() == 128 + signal.SIGKILL


def test_two_processes_make_one_run(teacher, tmp_path):
    folder = JobFolder(tmp_path / "job" / "run")
    folder.path.mkdir(parents=True)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    words = run_command(
        DistillationOptions(preset="scenes-debug", images=4, batch=4), str(teacher), prompts, 1, folder.path
    )
    with folder.process(words, environment(["cpu", "cpu"]), 0, 2) as child:
        child._supervisor.wait()
        assert child.status() == 0, folder.log_tail()
    assert folder.finished()
    assert json.loads((folder.path / "checkpoints" / f"{4:012d}" / "state.json").read_text())["processes"] == 2


def test_a_line_is_told_once_though_a_run_that_goes_on_writes_it_again(tmp_path):
    folder = JobFolder(tmp_path)
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"images": 8, "gap": 1}\n{"images": 16, "gap": 2}\n{"imag')
    (tmp_path / "alarms.jsonl").write_text('{"name": "collapse", "images": 16, "says": "less guidance"}\n')
    told = list(folder.new_lines())
    assert [(line.kind, line.images) for line in told] == [("metrics", 8), ("metrics", 16), ("alarm", 16)]
    assert list(folder.new_lines()) == []
    log.write_text('{"images": 8, "gap": 1}\n{"images": 16, "gap": 2.5}\n{"images": 24, "gap": 3}\n')
    assert [line.images for line in folder.new_lines()] == [24]
    (tmp_path / "evaluations.jsonl").write_text(json.dumps({"images": 16, "overall": 0.5}) + "\n")
    assert folder.metrics(16) == {"gap": 2.5, "overall": 0.5}
    assert folder.metrics(20) == {"gap": 2.5}


def test_garbage_in_a_log_is_passed_over(tmp_path):
    folder = JobFolder(tmp_path)
    whole = {"metrics": {"gap": 1}, "evaluations": {"overall": 0.5}, "alarms": {"name": "collapse", "says": "less"}}
    for name, values in whole.items():
        line = json.dumps({"images": 8, **values}).encode() + b"\n"
        (tmp_path / f"{name}.jsonl").write_bytes(GARBAGE + line + b'{"images": 9, "gap": 1e999, "name": 5}\n' + GARBAGE)
    told = list(folder.new_lines())
    assert [(line.kind, line.images) for line in told if line.images == 8] == [
        ("metrics", 8),
        ("evaluation", 8),
        ("alarm", 8),
    ]
    assert {line.images for line in told} == {8, 9}
    assert all(line.values["gap"] is None for line in told if line.images == 9)
    assert folder.metrics(8) == {"gap": 1, "overall": 0.5}
    assert folder.results().splitlines()[1].startswith("8,1")
    (tmp_path / "config.yaml").write_bytes(b"\xff: [")
    assert folder.budget() is None
    (tmp_path / "config.yaml").write_text("images: 13\nbatch: 8\n")
    assert folder.budget() == 16  # whole batches


def test_of_a_log_that_grows_only_what_is_new_is_read(tmp_path):
    log = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"images": images, "gap": "x" * 60_000}) + "\n" for images in (8, 16, 24)]
    log.write_text("".join(lines[:2]))
    folder = JobFolder(tmp_path)
    assert [line.images for line in folder.new_lines()] == [8, 16]
    with log.open("r+") as file:
        file.write("?" * (len(lines[0]) - 1))  # whoever read it again would find no line here
        file.seek(0, os.SEEK_END)
        file.write(lines[2][:-1])
    assert list(folder.new_lines()) == []  # half a line
    with log.open("a") as file:
        file.write("\n")
    assert [line.images for line in folder.new_lines()] == [24]
    assert [folder.metrics(images)["gap"][:1] for images in (16, 20, 24)] == ["x"] * 3
    assert folder.metrics(15) == {}


def test_the_end_is_foreseen_at_the_speed_of_this_start():
    now = 100.0
    pace = EtaEstimator(lambda: now)
    assert pace.finish(0, 64) is None
    assert pace.finish(16, 64) is None
    now = 110.0
    before = int(time.time())
    finish = pace.finish(32, 64)
    assert finish is not None
    assert before + 20 <= finish <= time.time() + 20


def test_lines_are_told_once_and_a_judgment_joins_the_checkpoint_that_was_written_before_it(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    database.migrate()
    texts = {"owner": "ann", "status": "running", "model": "tiny", "training_file": "file-1"}
    facts = {"seed": 1, "hyperparameters": {}, "distillation": {}, "result_files": [], "created_at": 1}
    early = [LogLine("metrics", images, {"images": images, "gap": 2.0}) for images in (8, 16)]
    late = [LogLine("evaluation", images, {"images": images, "overall": images / 32}) for images in (16, 24)]
    alarm = LogLine("alarm", 16, {"images": 16, "name": "collapse", "says": "less guidance"})
    with database.begin() as session:
        job = JobRow(id="ftjob-1", **texts, **facts, images_seen=0, images_total=32)
        session.add(job)
        session.flush()
        record_log_lines(session, job, early)
        record_checkpoint(session, job, 16, {"gap": 1.0})
        record_log_lines(session, job, [*early, *late, *early, alarm])
        assert job.images_seen == 24
    with database.begin() as session:
        (kept,) = session.scalars(select(JobCheckpointRow))
        assert kept.metrics == {"step": 16, "gap": 1.0, "overall": 0.5}
        told = list(session.scalars(select(JobEventRow).order_by(JobEventRow.number)))
    assert [(event.number, event.message) for event in told] == [
        (1, "Images seen: 8 of 32"),
        (2, "Images seen: 16 of 32"),
        (3, "The student was judged: 16 of 32"),
        (4, "The student was judged: 24 of 32"),
        (5, "Alarm, collapse: less guidance"),
    ]
    assert [event.type for event in told] == ["metrics"] * 4 + ["message"]
    assert told[1].data == {"step": 16, "total_steps": 32, "images": 16, "gap": 2.0}
    database.close()


def test_results_are_a_row_for_each_number_of_images(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"images": 8, "gap": 1}\n{"images": 16, "gap": 2}\n{"images": 8, "gap": 3}\n'
    )
    (tmp_path / "evaluations.jsonl").write_text('{"images": 16, "overall": 0.5}\n')
    assert JobFolder(tmp_path).results().splitlines() == ["step,gap,overall", "8,3,", "16,2,0.5"]


@pytest.mark.parametrize(
    ("words", "code", "param"),
    [
        ("could not save run: [Errno 28] No space left on device; make room", "disk_full", None),
        ("prompts.jsonl line 3 is not JSON", "invalid_training_file", "training_file"),
        ("no method 'fmg'", "distillation_failed", "distillation"),
    ],
)
def test_a_refusal_names_what_is_at_fault(words, code, param):
    assert _refusal(words).error == {"code": code, "message": words, "param": param}


def test_a_refusal_repeats_little_of_the_training_file():
    refused = _refusal(f"prompts.parquet has no column prompt, only {'x' * 5000}; rename one")
    assert refused.error["code"] == "invalid_training_file"
    assert refused.error["message"].startswith("prompts.parquet has no column prompt")
    assert refused.error["message"].endswith("; rename one")
    assert "x" * 201 not in refused.error["message"]
