"""A run prints the next commands for its student."""

from pathlib import Path

import yaml

from distill.cli.run import next_steps
from distill.config import load_config


def commands(folder: Path, *overrides: str) -> str:
    """Return what a run in the folder with these overrides prints at its end."""
    config = load_config("scenes-debug", overrides)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    return next_steps(config, folder)


def test_a_finished_run_names_the_next_commands(tmp_path: Path) -> None:
    folder, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    shown = commands(folder)
    assert f"distill report {folder}" in shown
    assert f"distill evaluate --student {folder}/student --picture {folder}/teacher-vs-student.png" in shown
    assert f"distill export {folder} --single-file {folder}/student.safetensors" in shown
    assert f"fgm-service serve --model {folder}/student" in shown
    other = commands(folder, "teacher=sd3", f"prompts.source={prompts}", "evaluation.images=32")
    # The teacher's images that the run has made already
    assert f"--teacher sd3 --prompts {prompts} --images 32 --steps 2" in other
    assert f"--references {folder}/references" in other
    assert "distill evaluate" not in commands(folder, "teacher=sd3", "prompts.source=-")
