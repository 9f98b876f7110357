"""The commands of a job are commands of `distill`."""

from commands import invoke
from typer.main import get_command

from distill.cli import app
from distill.config import load_config
from distill.data.prompts import read_prompts
from service.jobs.fine_tuning.commands import DISTILL, prompts_command, run_command
from service.jobs.fine_tuning.options import DistillationOptions


def test_the_command_of_a_run_is_accepted_by_distill(tmp_path):
    options = DistillationOptions(preset="scenes", method="dmd", seconds=9.5, images=None)
    words = run_command(options, 'a "teacher"', tmp_path / "prompts.txt", 7, tmp_path / "run")
    assert (*words[:3], words[3]) == (*DISTILL, "run")
    parsed = get_command(app).commands["run"].make_context("run", words[4:]).params
    assert parsed["config"] == "scenes"
    assert (parsed["method"], parsed["seconds"], parsed["out"]) == ("dmd", 9.5, tmp_path / "run")
    run = load_config("scenes", parsed["overrides"])
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
