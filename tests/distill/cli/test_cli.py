"""Wrong input to any command gives one sentence and exit status 2, before anything is computed."""

import sys

import pytest
import torch
from commands import invoke

from distill.cli import main
from distill.config import load_config
from distill.errors import ConfigError, OutputError
from distill.models.device import resolve_device
from distill.student.export import check_size
from distill.training.accelerator import accelerator_for, check

PLAN = ("plan", "sd3-medium")
RUN = ("run", "scenes-debug")


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must exit with status 2, and return its error message."""
    monkeypatch.setattr(sys, "argv", ["distill", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        (*RUN, "--seconds", "nan"),
        (*RUN, "--seconds", "inf"),
        ("compare", "fgm", "--seconds", "1e308"),
        ("compare", "fgm", "--seed", "-1"),
        ("compare", "fgm", "--seed", str(2**64)),
        ("compare", "fgm", "--per-task", "-1"),
        ("embed", "teacher", "prompts.txt", "--out", "cache", "--count", "-1"),
        ("embed", "teacher", "prompts.txt", "--out", "cache", "--count", str(10**30)),
        ("encode", "teacher", "scenes", "--out", "cache", "--seed", str(10**30)),
        ("evaluate", "--guidance", "nan"),
        ("evaluate", "--seed", "-1"),
        ("evaluate", "--steps", "-1"),
        ("geneval", "file", "--out", "images", "--seed", str(2**64)),
        ("generate", "a", "--guidance", "0"),
        ("generate", "a", "--count", "-1"),
        ("generate", "a", "--seed", str(2**63)),
        (*PLAN, "--device-memory", "inf"),
        (*PLAN, "--reserve", "nan"),
        (*PLAN, "--tflops", "0"),
        (*PLAN, "--utilization", "0"),
        (*PLAN, "--size", "-64"),
        (*PLAN, "--rank", str(10**30)),
        (*PLAN, "--batch", str(10**30)),
        ("scenes", "show", "--count", "-1"),
        ("scenes", "show", "--seed", "-1"),
        ("submit", "prompts.txt", "--seconds", "inf"),
    ],
    ids=" ".join,
)
def test_numbers_out_of_range_are_refused_by_the_name_of_the_option(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    option = next(word for word in reversed(words) if word.startswith("--"))
    assert f"'{option}'" in said(monkeypatch, capsys, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("teacher", "--set", "learning_rate=.inf"), "learning_rate: "),
        (("teacher", "--set", "learning_rate=-1"), "learning_rate: "),
        (("teacher", "--set", "learning_rte=1"), "did you mean 'learning_rate'?"),
        (("cifar10", "teacher", "data", "--set", "seed=-1"), "seed: "),
    ],
)
def test_recipes_out_of_range_are_refused_by_the_name_of_the_key(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert message in said(monkeypatch, capsys, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("run", "scenes-debug", "--out", ""), ("embed", "scenes", "a.txt", "--out=")])
def test_an_empty_out_is_not_the_current_folder(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert said(monkeypatch, capsys, *words).startswith("error: --out is empty")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        (*RUN, "--out"),
        ("compare", "fgm", "--config", "scenes-debug", "--images", "16", "--out"),
        ("teacher", "--out"),
    ],
    ids=lambda words: words[0],
)
def test_a_folder_below_a_file_is_one_sentence(words, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("somebody's")
    error = said(monkeypatch, capsys, *words, str(tmp_path / "file" / "out"))
    assert error.splitlines()[-1].startswith("error: ")
    assert str(tmp_path / "file") in error
    assert "Traceback" not in error
    assert (tmp_path / "file").read_text() == "somebody's"


def test_a_picture_that_cannot_be_written_is_found_before_it_is_made(tmp_path):
    (tmp_path / "file").write_text("somebody's")
    done = invoke("scenes", "show", "--out", str(tmp_path / "file" / "scenes.png"))
    assert isinstance(done.exception, OutputError)


def test_what_the_system_says_of_a_file_is_one_sentence(monkeypatch, capsys, tmp_path):
    (tmp_path / "dir.yaml").mkdir()
    assert "dir.yaml cannot be read (Is a directory)" in said(monkeypatch, capsys, "run", str(tmp_path / "dir.yaml"))
    (tmp_path / "deep.yaml").write_text("[" * 10_000)
    assert "deep.yaml is not YAML" in said(monkeypatch, capsys, "run", str(tmp_path / "deep.yaml"))
    (tmp_path / "half.yaml").write_text('teacher: "\\uD83D"\n')
    half = said(monkeypatch, capsys, "run", str(tmp_path / "half.yaml"), "--out", str(tmp_path / "run"))
    assert "there is no teacher '\\ud83d'" in half.encode("ascii", "backslashreplace").decode()
    monkeypatch.setattr("distill.models.geometry.read_geometry", lambda *_: "\ud83d".encode())
    assert "'\\ud83d' is an incomplete Unicode character" in said(monkeypatch, capsys, *PLAN)


def test_a_missing_teacher_is_named_before_the_prompts_that_its_training_writes(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    error = said(monkeypatch, capsys, "run", "cifar10")
    assert "there is no folder runs/cifar10-teacher; train that teacher first" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lack_of_memory_is_one_sentence(error, monkeypatch, capsys):
    def fail(*_: str | None) -> None:
        raise error

    monkeypatch.setattr("distill.models.geometry.read_geometry", fail)
    assert "there is not enough memory" in said(monkeypatch, capsys, *PLAN)


@pytest.mark.parametrize("value", ["rank=nan", "rank=2020-01-01", "rank=1e999"])
def test_what_is_no_json_is_not_submitted(value):
    done = invoke("submit", "prompts.txt", "--set", value, "--url", "http://127.0.0.1:1")
    assert isinstance(done.exception, ConfigError)
    assert value in str(done.exception)


@pytest.mark.parametrize("name", ["nope", "", "meta", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match="there is no device"):
        resolve_device(name)


@pytest.mark.parametrize("size", ["0GB", "-5GB", "0.5KB", "5", "5gb", "", "1e9GB", "9" * 400 + "GB"])
def test_a_size_of_files_that_is_none_is_refused(size):
    with pytest.raises(ConfigError, match="is not a size"):
        check_size(size)
    check_size("0.5GB")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "ACCELERATE_USE_DEEPSPEED is set"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "ACCELERATE_USE_MEGATRON_LM is set"),
        ("ACCELERATE_TORCH_DEVICE", "nope", "accelerate does not start"),
        ("ACCELERATE_TORCH_DEVICE", "meta", "there is no device 'meta'"),
        ("ACCELERATE_USE_CPU", "perhaps", "accelerate does not start"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "many", "accelerate does not start"),
    ],
)
def test_an_environment_for_an_engine_that_cannot_be_used_is_refused(name, value, words, monkeypatch, tmp_path):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        check(load_config("scenes-debug"), accelerator_for("no", tmp_path, ()))
