"""The real command on a tiny teacher: a complete run, a killed one, another configuration, a full disk."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from commands import invoke, signal_once
from safetensors.torch import load_file
from tiny import make_teacher

from distill.cli import main
from distill.cli.stopping import stop_signals, stopped
from distill.config import load_config
from distill.errors import (
    CacheError,
    CheckpointError,
    ConfigError,
    DistillError,
    DivergedError,
    OutputError,
    RunError,
    SizeError,
    TeacherError,
)
from distill.models.sd3_folder import SD3Folder
from distill.pipeline import OneStepPipeline
from distill.plan.run_estimate import RunEstimate, estimate_run
from distill.report.run_folder import read_run
from distill.report.run_state import read_state
from distill.run import accelerator, run
from distill.student.run_export import export_run
from distill.training import checkpoint
from distill.training.accelerator import accelerator_for
from distill.training.preparation import check_run, prepare
from distill.training.run_lock import run_lock
from distill.training.run_sources import RunPrompts
from distill.training.run_teacher import open_pinned, pin_teachers, read_config, read_teacher

TIMES = ("seconds/", "wall_seconds", "memory/")  # metrics that differ between two runs
ARGUMENTS = (
    "batch=8",
    "images=96",
    "cadence.checkpoint=16",
    "cadence.log=16",
    "cadence.sample=96",
    "precision=fp32",  # for sums that two processes, or an interrupted run, form in another order
    "optimizer.warmup_images=0",
    "evaluation.evaluator=none",  # with one: training/test_run_evaluator.py
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\na blue square\ncircle and square\nred\nleft of a circle\n")
    return path


def command(teacher: Path, prompts: Path, out: Path, *overrides: str) -> list[str]:
    values = [f"teacher={teacher}", f"prompts.source={prompts}", *ARGUMENTS, *overrides]
    return ["run", "scenes-debug", *(f"--set={value}" for value in values), "--out", str(out)]


def check_and_prepare(config, out: Path) -> None:
    pins = pin_teachers(config, out)
    check_run(config, out, open_pinned(config, pins))
    prepare(config, out, pins)


def encode_prompts(config, out: Path):
    return RunPrompts(config.prompts, out).encode(read_teacher(config, out), torch.device("cpu"), False)


def final(out: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    assert newest.name == "000000000096"
    return load_file(newest / "state.safetensors")


def weights(student: Path) -> list[Path]:
    return list(student.glob("*/*.safetensors"))


def metrics(out: Path) -> list[dict[str, float]]:
    """Return the log's lines without times and memory."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in lines]


def assert_same_end(out: Path, undisturbed: Path) -> None:
    expected, found = final(undisturbed), final(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert metrics(out) == metrics(undisturbed)


@pytest.fixture(scope="module", params=["full", "lora"])
def whole(request, teacher, prompts, tmp_path_factory) -> tuple[str, Path]:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / request.param
    done = invoke(*command(teacher, prompts, out, f"networks.kind={request.param}"))
    assert done.exit_code == 0, done.output
    return request.param, out


def test_a_run_leaves_everything_it_promises(whole):
    kind, out = whole
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [16, 32, 48, 64, 80, 96]
    for name in (
        "gap",
        "loss/fake",
        "gradient_norm/student",
        "gradient_norm/fake",
        "latent/std",
        "latent/diversity",
        "seconds/data",
        "seconds/fake",
        "seconds/student",
        "memory/peak",
    ):
        assert all(name in line for line in lines)
    assert any(name.startswith("log10_gap/t") for name in lines[0])
    assert all(0 < line[f"update_ratio/{role}"] < 0.05 for line in lines for role in ("student", "fake"))
    assert read_run(out).alarms == []
    assert (out / "samples" / "000000000096.png").exists()
    assert list((out / "tensorboard").rglob("events*"))
    seconds = [line["wall_seconds"] for line in lines]
    assert 0 < seconds[0] < seconds[-1]
    assert seconds == sorted(seconds)
    assert read_state(out).phase == "finished"
    assert len(list((out / "checkpoints").iterdir())) == 2
    records = [checkpoint.load(path)[1] for path in sorted((out / "checkpoints").iterdir())]
    assert 0 < records[0]["seconds"] < records[1]["seconds"]
    pipeline = OneStepPipeline.load(out / "student")
    assert pipeline.spec.images_seen == 96
    assert pipeline(["a red circle"], [0]).shape == (1, 16, 16, 3)
    assert (out / "student" / "pytorch_lora_weights.safetensors").exists() is (kind == "lora")


def test_a_run_takes_the_disk_that_is_stated_before_it_begins(whole, teacher, tmp_path):
    def taken(*folders: Path) -> int:
        return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())

    _, out = whole
    config = read_config(out)
    stated = estimate_run(
        config, tmp_path, SD3Folder.read(teacher), RunPrompts(config.prompts, tmp_path), torch.device("cpu")
    )
    kept = taken(*checkpoint.states(out / "checkpoints"))
    assert 1 < stated.checkpoints / kept < 2.5  # while a checkpoint is written, and the best student
    assert stated.student == pytest.approx(sum(path.stat().st_size for path in weights(out / "student")), rel=0.2)
    assert stated.cache < taken(out / "embeddings") < stated.cache + 20_000  # null, order, index


def test_a_run_that_lost_its_end_makes_it_again_with_the_same_bits(whole, teacher, prompts, tmp_path):
    """A kill leaves a checkpoint, and lines of the log after it."""
    kind, undisturbed = whole
    out = shutil.copytree(undisturbed, tmp_path / "cut")
    for lost in (checkpoint.latest(out / "checkpoints"), out / "student"):
        shutil.rmtree(lost)
    assert invoke(*command(teacher, prompts, out, f"networks.kind={kind}")).exit_code == 0
    assert (out / "student" / "onestep.json").exists()
    assert_same_end(out, undisturbed)


@pytest.mark.parametrize("whole", ["full"], indirect=True)
def test_a_killed_run_ends_with_the_same_bits_also_if_prompts_are_encoded_online(whole, teacher, prompts, tmp_path):
    kind, cached = whole
    source, out = tmp_path / "prompts.txt", tmp_path / "killed"
    source.write_text(prompts.read_text())
    arguments = command(teacher, source, out, f"networks.kind={kind}", "prompts.encoding=online")
    values = [word.removeprefix("--set=") for word in arguments if word.startswith("--set=")]
    config = load_config("scenes-debug", values)
    begun = tmp_path / "begun"
    steps = run(config, begun, accelerator(config, begun))
    next(steps)
    while checkpoint.latest(begun / "checkpoints") is None:
        next(steps)
    shutil.copytree(begun, out)  # what a kill leaves
    steps.close()
    source.unlink()
    assert invoke(*arguments).exit_code == 0
    assert_same_end(out, cached)
    assert not (out / "embeddings").exists()
    assert json.loads((out / "sources.json").read_text()) == json.loads((cached / "sources.json").read_text())
    assert json.loads((out / "student" / "onestep.json").read_text())["prompts"]["count"] == 5

    source.write_text("others\n")
    changed = invoke(*arguments, "--set=images=104")
    assert isinstance(changed.exception, CacheError)
    assert "online-prompts.jsonl has other prompts than the source holds now" in str(changed.exception)
    (out / "online-prompts.jsonl").write_text('"others"\n')
    refused = invoke(*arguments, "--set=images=104")
    assert isinstance(refused.exception, CheckpointError)
    assert "was trained on other prompts than it is given now" in str(refused.exception)


def test_a_finished_run_is_not_done_again_and_another_configuration_is_refused(whole, teacher, prompts):
    kind, out = whole
    before = (out / "student" / "onestep.json").stat().st_mtime_ns
    assert invoke(*command(teacher, prompts, out, f"networks.kind={kind}")).exit_code == 0
    assert (out / "student" / "onestep.json").stat().st_mtime_ns == before
    refused = invoke(*command(teacher, prompts, out, f"networks.kind={kind}", "optimizer.max_grad_norm=2"))
    assert isinstance(refused.exception, CheckpointError)
    assert "optimizer.max_grad_norm = 1.0, not 2" in str(refused.exception)
    assert "max_grad_norm: 1.0" in (out / "config.yaml").read_text()


def test_a_run_of_another_version_is_named_and_left_alone(teacher, prompts, tmp_path):
    kept = tmp_path / "config.yaml"
    kept.write_text("teacher: scenes\nema: 0.9\n")
    refused = invoke(*command(teacher, prompts, tmp_path, "networks.kind=full"))
    assert isinstance(refused.exception, CheckpointError)
    assert "config.yaml is no configuration of this version (unknown key 'ema'" in str(refused.exception)
    assert "give another --out" in str(refused.exception)
    assert kept.read_text() == "teacher: scenes\nema: 0.9\n"


@pytest.mark.parametrize("older", ["budget", "phase"])
def test_a_run_that_was_killed_before_its_export_does_not_keep_an_older_student(whole, teacher, prompts, older):
    """The older student is of a smaller budget, or was exported during the run."""
    kind, out = whole
    record = out / "student" / "onestep.json"
    after = record.read_text()
    record.write_text(json.dumps({**json.loads(after), "images_seen": 8}))
    state = json.loads((out / "state.json").read_text())
    changed = {"budget": 88} if older == "budget" else {"phase": "training"}
    (out / "state.json").write_text(json.dumps({**state, **changed}))
    assert read_run(out).state == "stopped"
    assert invoke(*command(teacher, prompts, out, f"networks.kind={kind}")).exit_code == 0
    assert record.read_text() == after
    assert read_run(out).state == "finished"


def test_a_copied_run_folder_means_the_same(whole, tmp_path):
    _, out = whole
    copy = shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copyfile)  # with other file times
    for path in copy.rglob("*"):
        os.utime(path, (0, 0))
    os.utime(copy / "checkpoints" / checkpoint.state_name(96))
    before, after = read_run(out), read_run(copy)
    assert (after.state, after.images, after.changed) == (before.state, before.images, before.changed)
    assert after.state == "finished"


def test_a_run_reads_the_folder_of_its_teacher_once(teacher, prompts, tmp_path):
    opened, listening = [], True

    def hook(event, arguments):  # which cannot be removed again
        if listening and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)
    done = invoke(*command(teacher, prompts, tmp_path / "run", "images=8"))
    listening = False
    assert done.exit_code == 0, done.output
    assert opened.count(str(teacher / "model_index.json")) == 1


def test_a_checkpoint_is_exported_and_stock_diffusers_agrees(whole, tmp_path):
    kind, out = whole
    arguments = ["export", str(out), "--checkpoint", "80", "--dtype", "fp32", "--license", "mit", "--check"]
    single = tmp_path / "single.safetensors"
    result = invoke(*arguments, "--out", str(tmp_path / "student"), "--single-file", str(single))
    assert "after 80 images" in result.output
    assert f"Its single file is {single}." in result.output
    assert "Stock diffusers makes the same latents" in result.output
    record = json.loads((tmp_path / "student" / "onestep.json").read_text())
    assert (record["dtype"], record["images_seen"]) == ("float32", 80)
    assert record["prompts"] == {"source": "prompts.txt", "count": 5}
    card = (tmp_path / "student" / "README.md").read_text()
    assert "license: mit" in card
    assert "5 distinct prompts from `prompts.txt`" in card
    assert f"kind: {kind}" in card
    for path in (out / "student", tmp_path / "student"):
        assert all("/prompts.txt" not in (path / name).read_text() for name in ("onestep.json", "README.md"))
    weights = load_file(tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert load_file(single)["model.diffusion_model.final_layer.linear.weight"].equal(weights["proj_out.weight"])
    average, _ = checkpoint.load(out / "checkpoints" / checkpoint.state_name(80), "average")
    if kind == "full":
        assert all(torch.equal(weights[name], tensor) for name, tensor in average.items())


def test_students_of_several_checkpoints_are_averaged(whole, tmp_path):
    kind, out = whole
    student = export_run(out, tmp_path / "mean", "96, 80", torch.float32)
    record = json.loads((student / "onestep.json").read_text())
    assert (record["images_seen"], record["mean_of"], record["metrics"]) == (96, [80, 96], {})
    assert "on 96 samples, the mean of the checkpoints at 80, 96." in (student / "README.md").read_text()
    if kind == "full":
        weights = load_file(student / "transformer" / "diffusion_pytorch_model.safetensors")
        first, second = (
            checkpoint.load(out / "checkpoints" / checkpoint.state_name(images), "average")[0] for images in (80, 96)
        )
        for name in first:
            torch.testing.assert_close(weights[name], (first[name] + second[name]) / 2)
        assert any(not torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(RunError, match=r"has no checkpoint 8; give .* the images of one or more: .*80, 96"):
        export_run(out, tmp_path / "none", "80,8")


def test_a_student_is_averaged_with_others_of_its_teacher(whole, tmp_path):
    kind, out = whole
    others = [export_run(out, tmp_path / str(images), str(images), torch.float32) for images in (80, 96)]
    if kind == "lora":
        with pytest.raises(ConfigError, match="only one-step students of full copies"):
            export_run(out, tmp_path / "mean", average_with=others)
        return
    student = export_run(out, tmp_path / "mean", "96", torch.float32, average_with=others)
    record = json.loads((student / "onestep.json").read_text())
    assert record["averaged_with"] == [SD3Folder.read(other).digest for other in others]
    assert "averaged with 2 other students of the teacher." in (student / "README.md").read_text()
    file = Path("transformer") / "diffusion_pytorch_model.safetensors"
    first, second, average = (load_file(folder / file) for folder in (*others, student))
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, (first[name] + 2 * second[name]) / 3)
    of_another = json.loads((others[0] / "onestep.json").read_text()) | {"teacher_digest": "another"}
    (others[0] / "onestep.json").write_text(json.dumps(of_another))
    with pytest.raises(ConfigError, match=r"--average-with .* is the student of another teacher"):
        export_run(out, tmp_path / "none", average_with=others)


def test_a_single_file_of_another_program_is_kept(whole, tmp_path):
    single = tmp_path / "single.safetensors"
    single.write_text("of another program")
    arguments = ["export", str(whole[1]), "--out", str(tmp_path / "student")]
    for options, kind in (
        (["--single-file", str(single)], OutputError),
        (["--single-file", str(tmp_path / "single.ckpt")], ConfigError),
        (["--text-encoders"], ConfigError),
        (["--teacher-base", str(tmp_path)], ConfigError),
        (
            ["--single-file", str(tmp_path / "new.safetensors"), "--text-encoders"],
            TeacherError,
        ),  # CLIP has a projection
    ):
        assert isinstance(invoke(*arguments, *options).exception, kind)
    assert single.read_text() == "of another program"
    assert not (tmp_path / "student").exists()


def test_a_student_of_another_size_than_the_toy_dataset_s_is_not_evaluated(whole, tmp_path):
    done = invoke("evaluate", "--student", str(whole[1] / "student"), "--picture", str(tmp_path / "picture.png"))
    assert isinstance(done.exception, SizeError)
    assert "makes images of 16x16 pixels" in str(done.exception)


def test_exporting_what_is_not_there_names_what_is(whole, tmp_path):
    _, out = whole
    with pytest.raises(RunError, match="no checkpoint 12; give best, last or the images of one or more: 80, 96"):
        export_run(out, tmp_path / "student", "12")
    with pytest.raises(RunError, match="is not a run"):
        export_run(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_is_recorded_and_sets_the_exit_status(number):
    before = signal.getsignal(number)
    with stop_signals() as received:
        signal.raise_signal(number)
        assert signal.getsignal(number) is before  # the second stops at once
    assert received == [number]
    assert stopped(8, received).exit_code == 128 + number


def test_an_interrupted_run_keeps_what_it_learnt(teacher, prompts, tmp_path):
    out = tmp_path / "interrupted"
    endless = ("images=100000", "cadence.log=8", "cadence.checkpoint=100000", "cadence.sample=100000")
    arguments, metrics = command(teacher, prompts, out, *endless), out / "metrics.jsonl"
    with signal_once(metrics.exists, signal.SIGINT):
        interrupted = invoke(*arguments)
    assert interrupted.exit_code == 128 + signal.SIGINT
    saved = checkpoint.latest(out / "checkpoints")
    assert saved is not None
    images = int(saved.name)
    assert f"Stopped after {images} images" in interrupted.output
    assert (read_state(out).phase, read_state(out).images) == ("interrupted", images)
    seconds = read_state(out).seconds
    assert invoke(*command(teacher, prompts, out, *endless, f"images={images + 8}")).exit_code == 0
    assert read_state(out).seconds > seconds > 0  # of both sessions
    assert [json.loads(line)["images"] for line in metrics.read_text().splitlines()] == [*range(8, images + 9, 8)]


@pytest.mark.parametrize(("error", "phase"), [(KeyboardInterrupt, "interrupted"), (OSError, "failed")])
def test_a_run_that_stops_while_it_encodes_records_so(error, phase, teacher, prompts, tmp_path):
    config = load_config("scenes-debug", [f"teacher={teacher}", f"prompts.source={prompts}"])
    steps = run(config, tmp_path / "run", accelerator(config, tmp_path / "run"))
    assert isinstance(next(steps), RunEstimate)
    next(steps)
    assert read_state(tmp_path / "run").phase == "encoding"
    with pytest.raises(error):
        steps.throw(error())
    assert read_state(tmp_path / "run").phase == phase


def test_a_budget_is_shown_in_whole_batches_and_prompts_as_the_distinct_ones(teacher, prompts, tmp_path):
    (tmp_path / "prompts.txt").write_text(2 * prompts.read_text())
    out = tmp_path / "run"
    done = invoke(*command(teacher, tmp_path / "prompts.txt", out, "images=13", "cadence.sample=100000"))
    assert re.search(r"prompts 5/5  \S+ prompts/s", done.output)
    assert "distilling 16/16" in done.output
    assert read_run(out).budget == 16


def test_patience_that_nothing_can_end_is_told_at_the_start(teacher, tmp_path, caplog):
    foreign = load_config(
        "scenes-debug", [f"teacher={teacher}", "evaluation.evaluator=none", "early_stopping_patience=1"]
    )
    with pytest.raises(ConfigError, match=r"early_stopping_patience counts evaluations"):
        check_and_prepare(foreign, tmp_path / "foreign")
    assert not (tmp_path / "foreign").exists()
    short = load_config("scenes-debug", ["early_stopping_patience=1"])
    check_and_prepare(short, tmp_path / "short")
    assert "early_stopping_patience 1 cannot end this run" in caplog.text
    caplog.clear()
    enough = load_config("scenes-debug", ["early_stopping_patience=1", "cadence.evaluate=32"])
    check_and_prepare(enough, tmp_path / "enough")
    assert not caplog.text


def test_a_full_disk_under_any_command_is_one_sentence(tmp_path):
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "distill.cli", "runs", str(tmp_path)]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device; free disk space and run the same command again to resume\n"


@pytest.mark.parametrize(
    "name",
    [
        "student/notes.txt",
        "student/onestep.json",
        "metrics.jsonl",
        "online-prompts.jsonl",
        "checkpoints/1/a",
        "best/a",
        "alarms.jsonl",
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_a_run_begins_where_it_replaces_nothing(name, begun, teacher, tmp_path):
    config = load_config("scenes-debug", [f"teacher={teacher}"])
    if begun:
        check_and_prepare(config, tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    if begun and not name.startswith("student"):
        check_and_prepare(config, tmp_path)  # a run's own
    else:
        with pytest.raises(OutputError, match=name.partition("/")[0]):
            check_and_prepare(config, tmp_path)
        assert (tmp_path / "config.yaml").exists() is begun
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_continues_and_exports_without_its_damaged_newest_checkpoint(whole, teacher, prompts, tmp_path):
    kind, undisturbed = whole
    out = shutil.copytree(undisturbed, tmp_path / "damaged")
    shutil.rmtree(out / "student")
    with (out / "checkpoints" / checkpoint.state_name(96) / "state.safetensors").open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)
    assert OneStepPipeline.load(export_run(out)).spec.images_seen == 80
    with pytest.raises(CheckpointError, match="checksum"):
        export_run(out, tmp_path / "student", "96")
    assert not (tmp_path / "student").exists()
    assert invoke(*command(teacher, prompts, out, f"networks.kind={kind}")).exit_code == 0
    assert_same_end(out, undisturbed)


@pytest.mark.parametrize("form", ["{}/", "./{}", "{}/../{}", "~/{}", "moved"])
def test_a_teacher_is_known_by_its_files_wherever_it_is(form, whole, teacher, prompts, tmp_path, monkeypatch):
    kind, undisturbed = whole
    out = shutil.copytree(undisturbed, tmp_path / "run")
    copy = shutil.copytree(teacher, tmp_path / ("elsewhere" if form == "moved" else teacher.name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    place = copy.name if form == "moved" else form.format(copy.name, copy.name)
    again = command(teacher, prompts, out, f"networks.kind={kind}", f"teacher={place}", "images=96")
    before = (out / "student" / "onestep.json").stat().st_mtime_ns
    done = invoke(*again)
    assert done.exit_code == 0, done.output
    assert (out / "student" / "onestep.json").stat().st_mtime_ns == before  # the run is finished
    record = json.loads((export_run(out, tmp_path / "exported") / "onestep.json").read_text())
    assert record["name"] == f"{copy.name}-one-step"
    assert record["teacher_digest"] == SD3Folder.read(teacher).digest


def test_an_export_takes_the_teacher_s_new_place_and_no_other_teacher(whole, teacher, tmp_path):
    _, undisturbed = whole
    out = shutil.copytree(undisturbed, tmp_path / "run")
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace(str(teacher), str(tmp_path / "gone")))
    with pytest.raises(TeacherError, match="name its new place with --teacher"):
        export_run(out, tmp_path / "student")
    done = invoke("export", str(out), "--out", str(tmp_path / "student"), "--teacher", str(teacher))
    assert done.exit_code == 0, done.output
    other = make_teacher(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="was trained from another teacher"):
        export_run(out, tmp_path / "another", teacher=SD3Folder.read(other))
    with pytest.raises(CheckpointError, match="was trained from another teacher"):
        check_and_prepare(read_config(out).model_copy(update={"teacher": str(other)}), out)
    assert not (tmp_path / "another").exists()


def test_a_start_that_does_not_fit_is_found_before_anything_is_made(whole, teacher, prompts, tmp_path):
    kind, begun = whole
    full = "networks.kind=full"
    lora = ("networks.kind=lora", "networks.rank=64")
    fits = {"full": [full], "lora": lora}[kind]
    starts = [
        ((f"init_from={tmp_path / 'nowhere'}", *fits), "has no checkpoint"),
        ((f"init_from={begun}", full), None if kind == "full" else "has other weights"),
        ((f"init_from={begun}", *lora), None),
        ((f"init_from={begun}", *fits, 'method={"name": "flow_map"}'), "has other weights"),
        ((f"init_from={begun / 'student'}", *lora), None),
        ((f"init_from={teacher}", *fits, f"prompts.source={tmp_path / 'nothing.txt'}"), "nothing.txt"),
        ((f"teacher={make_teacher(tmp_path / 'wide', sample_size=12)}", f"init_from={begun}", *fits), None),
    ]
    if kind == "lora":
        starts += [
            ((f"init_from={begun}", "networks.kind=lora", "networks.rank=8"), "has other weights"),
            ((f"init_from={begun}", *lora, "networks.alpha=8"), "networks.alpha 64"),
            ((f"init_from={begun}", *lora, "networks.targets=[to_q]"), "has other weights"),
        ]
    for number, (words, message) in enumerate(starts):
        config = load_config("scenes-debug", [f"teacher={teacher}", f"prompts.source={prompts}", *words])
        out = tmp_path / f"run-{number}"
        if message is None:
            check_run(config, out, read_teacher(config, out))
            continue
        with pytest.raises(DistillError, match=message):
            check_run(config, out, read_teacher(config, out))
        assert not out.exists()


@pytest.mark.parametrize(
    "typo",
    [
        "teacher=nowhere",
        "init_from=nowhere",
        "prompts.source=nowhere.txt",
        "prompts.source=empty",
        "damaged",
        "method.guidance.skip_layers=[7,8,9]",  # of 2 blocks
    ],
)
def test_a_typo_leaves_no_folder_and_locks_none(typo, teacher, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if typo == "damaged":
        assert invoke("embed", str(teacher), str(prompts), "--out", "damaged").exit_code == 0
        (tmp_path / "damaged" / "null.safetensors").write_bytes(b"")
        typo = "prompts.source=damaged"
    wrong = invoke(*command(teacher, prompts, tmp_path / "run", typo))
    assert isinstance(wrong.exception, DistillError)
    assert not (tmp_path / "run").exists()


def test_a_driven_run_raises_alarms_once_and_only_there(teacher, prompts, tmp_path):
    out = tmp_path / "driven"
    done = invoke(*command(teacher, prompts, out, "optimizer.student_lr=0.3", "trackers=[]", "images=64"))
    assert done.exit_code == 0, done.output
    raised = read_run(out).alarms
    assert "too-fast" in {alarm.name for alarm in raised}
    assert len({alarm.name for alarm in raised}) == len(raised)
    assert all(done.stderr.count(alarm.message) == 1 for alarm in raised)
    assert "distilling 64/64" in done.stderr
    assert not (out / "tensorboard").exists()


def test_a_run_ends_early_with_its_best_student_and_the_same_command_leaves_it(teacher, prompts, tmp_path):
    out = tmp_path / "early"
    values = ("images=4000", "early_stopping_patience=1", "ema_half_life=0", "optimizer.student_lr=0.5",
              "evaluation.evaluator=reference", "cadence.evaluate=8", "cadence.sample=4000")  # fmt: skip
    arguments = command(teacher, prompts, out, *values)
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    run = read_run(out)
    assert run.state == "finished"
    assert read_state(out).phase == "ended early"
    assert run.images == run.evaluations[-1]["images"] < 4000
    assert any(b"evaluation/kernel" in path.read_bytes() for path in (out / "tensorboard").rglob("events*"))
    assert run.best["kernel"] == min(line["kernel"] for line in run.evaluations)
    assert (run.teacher["kernel"], run.teacher["relative_diversity"]) == (0, 1)
    assert f"no better student than that after {int(run.best['images'])} images" in done.stderr
    assert json.loads((out / "student" / "onestep.json").read_text())["images_seen"] == run.best["images"]
    before = (out / "student" / "onestep.json").stat().st_mtime_ns
    assert invoke(*arguments).exit_code == 0
    (out / "checkpoints").rename(tmp_path / "checkpoints")  # as if they were removed for their size
    assert invoke(*arguments).exit_code == 0
    assert (out / "student" / "onestep.json").stat().st_mtime_ns == before
    assert read_run(out).images == run.images
    (tmp_path / "checkpoints").rename(out / "checkpoints")
    log = (out / "evaluations.jsonl").read_text()
    other = command(teacher, prompts, out, *values, "evaluation.teacher_steps=1")  # it may find a better student yet
    assert invoke(*other).exit_code == 0
    resumed = read_run(out)
    assert resumed.images > run.images
    assert [line["images"] for line in resumed.evaluations] == [*range(run.images, resumed.images + 1, 8)]
    assert (out / "evaluations-1.jsonl").read_text() == log


@pytest.mark.parametrize(("name", "words"), [("wandb", "pip install wandb"), ("wandbb", "there is no 'wandbb'")])
def test_a_tracker_that_is_not_there_is_named(name, words, tmp_path):
    if name == "wandb" and find_spec("wandb"):
        pytest.skip("wandb is installed here")
    with pytest.raises(ConfigError, match=words):
        accelerator_for("no", tmp_path, [name])


def test_a_number_that_is_not_finite_stops_the_run(teacher, prompts, tmp_path):
    wild = ("optimizer.student_lr=1e30", "optimizer.fake_lr=1e30")
    done = invoke(*command(teacher, prompts, tmp_path / "wild", *wild))
    assert isinstance(done.exception, DivergedError)
    assert "lower optimizer." in str(done.exception)
    assert read_state(tmp_path / "wild").phase == "failed"


def test_a_folder_that_is_taken_ends_the_command_with_the_status_of_try_again(
    teacher, prompts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["distill", *command(teacher, prompts, tmp_path)])
    with run_lock(tmp_path), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == os.EX_TEMPFAIL
    assert "another run is writing" in capsys.readouterr().err


def test_seconds_are_a_budget_and_a_method_takes_the_presets_place(teacher, prompts, tmp_path):
    overrides = ("images=8", "cadence.log=8", "cadence.checkpoint=100000")
    done = invoke(*command(teacher, prompts, tmp_path, *overrides), "--method", "dmd", "--seconds", "1")
    assert done.exit_code == 0, done.output
    speed = json.loads((tmp_path / "speed.json").read_text())["images_per_second"]
    run = read_run(tmp_path)
    assert run.config["method"]["name"] == "dmd"
    assert run.budget == run.images == max(1, int(speed / 8)) * 8
    assert run.state == "finished"
    assert not (tmp_path / ".speed").exists()


def test_a_run_takes_a_cache_of_prompts_that_others_share(teacher, prompts, tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "run"
    assert invoke("embed", str(teacher), str(prompts), "--out", str(cache), "--device", "cpu").exit_code == 0
    done = invoke(*command(teacher, cache, out, "images=16", "cadence.sample=16"))
    assert done.exit_code == 0, done.output
    assert not (out / "embeddings").exists()
    assert (out / "samples" / "000000000016.png").exists()
    assert json.loads((out / "student" / "onestep.json").read_text())["prompts"] == {"source": "cache", "count": 5}
    refused = invoke(*command(teacher, cache, tmp_path / "new", "prompts.column=text"))
    assert isinstance(refused.exception, ConfigError)
    assert "column 'text' is named, but" in str(refused.exception)

    shutil.rmtree(cache)  # another one in its place
    other = tmp_path / "other.txt"
    other.write_text("a red circle\n")
    assert invoke("embed", str(teacher), str(other), "--out", str(cache), "--device", "cpu").exit_code == 0
    refused = invoke(*command(teacher, cache, out, "images=32"))
    assert isinstance(refused.exception, CheckpointError)
    assert "was trained on other prompts than it is given now" in str(refused.exception)


def test_prompts_that_were_changed_in_place_are_refused(teacher, prompts, tmp_path):
    source, out = tmp_path / "prompts.txt", tmp_path / "run"
    source.write_text(prompts.read_text())
    assert invoke(*command(teacher, source, out, "images=16")).exit_code == 0
    kept = (out / "embeddings" / "embeddings.json").read_bytes()
    source.write_text(prompts.read_text().replace("blue", "red"))
    for images in (16, 32):
        refused = invoke(*command(teacher, source, out, f"images={images}"))
        assert isinstance(refused.exception, CacheError)
        assert "embeddings was made of other prompts than the source holds now" in str(refused.exception)
    assert (out / "embeddings" / "embeddings.json").read_bytes() == kept
    shutil.rmtree(out / "embeddings")
    refused = invoke(*command(teacher, source, out, "images=32"))  # what was learnt is bound to the old ones
    assert "was trained on other prompts" in str(refused.exception)


def test_a_run_goes_on_when_its_prompts_are_gone_and_says_so(teacher, prompts, tmp_path, caplog):
    source, out = tmp_path / "prompts.txt", tmp_path / "run"
    source.write_text(prompts.read_text())
    assert invoke(*command(teacher, source, out, "images=16")).exit_code == 0
    source.unlink()
    assert invoke(*command(teacher, source, out, "images=32")).exit_code == 0
    assert f"{source} is not read again; the run goes on with what was encoded" in caplog.text
    shutil.rmtree(out / "embeddings")
    refused = invoke(*command(teacher, source, out, "images=48"))
    assert "no prompt file" in str(refused.exception)


def test_a_run_that_has_only_encoded_takes_another_configuration(teacher, prompts, tmp_path):
    out = tmp_path / "run"
    first, second = (
        load_config("scenes-debug", [f"teacher={teacher}", f"prompts.source={prompts}", *more])
        for more in ((), ("optimizer.student_lr=3e-5", "method.alpha=0.5"))
    )
    check_and_prepare(first, out)
    list(encode_prompts(first, out))
    (out / "speed.json").write_text('{"images_per_second": 1.0}')
    check_and_prepare(first, out)
    assert (out / "speed.json").exists()
    check_and_prepare(second, out)
    assert not (out / "speed.json").exists()
    assert list(encode_prompts(second, out)) == []
    checkpoint.save(out / "checkpoints" / checkpoint.state_name(8), {"x": torch.zeros(1)}, {"images": 8})
    with pytest.raises(CheckpointError, match="optimizer"):
        check_and_prepare(first, out)
