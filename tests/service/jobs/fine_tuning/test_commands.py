"""The commands of a job are commands of `distill`."""

from pathlib import Path

import pytest
from commands import invoke
from huggingface_hub import constants
from pydantic import ValidationError
from typer.main import get_command

from distill.cli import app
from distill.config import load_config
from distill.data.prompts import read_prompts
from service.errors import NotFound
from service.jobs.fine_tuning.commands import DISTILL, check_fetched, find_teacher, prompts_command, run_command
from service.jobs.fine_tuning.options import DistillationOptions
from service.settings import Settings


def test_the_command_of_a_run_is_accepted_by_distill(tmp_path):
    options = DistillationOptions(preset="scenes", method="dmd", seconds=9.5, images=None)
    words = run_command(options, 'a "teacher"', tmp_path / "prompts.txt", 7, tmp_path / "run")
    assert (*words[:3], words[3]) == (*DISTILL, "run")
    parsed = get_command(app).commands["run"].make_context("run", words[4:]).params
    assert parsed["config"] == "scenes"
    assert (parsed["seconds"], parsed["out"]) == (9.5, tmp_path / "run")
    run = load_config("scenes", parsed["overrides"])
    assert run.method.name == "dmd"
    assert (run.teacher, run.prompts.source, run.seed) == ('a "teacher"', str(tmp_path / "prompts.txt"), 7)


def test_the_column_of_the_prompts_is_passed_to_both_commands(tmp_path):
    prompts, run = tmp_path / "prompts.CSV", tmp_path / "run"
    prompts.write_text("2024,text\na red circle,a blue square\n")
    options = DistillationOptions(preset="scenes", column="2024")
    words = run_command(options, "scenes", prompts, 7, run)
    params = get_command(app).commands["run"].make_context("run", words[4:]).params
    given = load_config("scenes", params["overrides"]).prompts
    assert list(read_prompts(given.source, column=given.column)) == ["a red circle"]
    assert invoke(*prompts_command(options, prompts)[3:]).exit_code == 0
    assert invoke(*prompts_command(DistillationOptions(preset="scenes", column="2025"), prompts)[3:]).exit_code == 1


def test_a_model_of_the_hub_is_offered_where_it_was_fetched(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "b1148b4028b9ec56ebd36444c193d56aeff7ab56"
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (tmp_path / "models--acme--tiny" / "refs").mkdir()
    (tmp_path / "models--acme--tiny" / "refs" / "main").write_text(commit)
    models = {"tiny": "acme/tiny", "pinned": f"acme/tiny@{commit}", "moved": "acme/tiny@v2", "other": "acme/other"}
    teachers = Settings(jobs={"teachers": models}).jobs.teachers
    assert teachers == models
    assert find_teacher(teachers, "tiny") == "acme/tiny"
    assert find_teacher(teachers, "pinned") == f"acme/tiny@{commit}"
    with pytest.raises(NotFound, match="the teacher 'tiny' is not wholly on the server") as refused:
        check_fetched("acme/tiny", "tiny")
    assert refused.value.code == "model_gone"
    assert "tiny cannot be used: error: acme/tiny@" in caplog.text
    (tmp_path / "half").mkdir()
    with pytest.raises(NotFound, match="the teacher 'half' is not on the server"):
        find_teacher({"half": str(tmp_path / "half")}, "half")
    for name in ("moved", "other"):
        with pytest.raises(NotFound, match=f"the teacher '{name}' is not on the server"):
            find_teacher(teachers, name)
    with pytest.raises(NotFound, match="there is no teacher 'acme/tiny'"):  # only the operator's names
        find_teacher(teachers, "acme/tiny")


def test_a_folder_wins_over_a_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    teachers = Settings(jobs={"teachers": {"tiny": "acme/tiny", "far": "a/b/c"}}).jobs.teachers
    assert teachers == {"tiny": str(tmp_path / "acme" / "tiny"), "far": str(tmp_path / "a" / "b" / "c")}
    assert Settings(jobs={"teachers": {"mine": "~/tiny"}}).jobs.teachers == {"mine": str(Path.home() / "tiny")}
    with pytest.raises(ValidationError, match="is a single file, and jobs take folders"):
        Settings(jobs={"teachers": {"file": "acme/tiny.safetensors"}})
