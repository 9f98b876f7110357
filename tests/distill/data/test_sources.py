"""The sources of the toy dataset are registered, and the package works without the folder of toy datasets."""

import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import distill
from distill.data.sources import IMAGE_SOURCES, PROMPT_SOURCES
from distill.evaluate.datasets import EVAL_DATASETS
from distill.models.teacher import TEACHERS

SOURCE = Path(distill.__file__).parent

# An editable install would find the folder of toy datasets in the checkout.
SCRIPT = """
import importlib, sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
modules, sys.argv = sys.argv[1].split(), sys.argv[1:]
for name in modules:
    importlib.import_module(name)
from distill.data.sources import IMAGE_SOURCES, PROMPT_SOURCES
from distill.evaluate.datasets import EVAL_DATASETS
from distill.models.teacher import TEACHERS
assert not (EVAL_DATASETS or IMAGE_SOURCES or PROMPT_SOURCES or TEACHERS)
from distill.cli import main
main()
"""


def test_the_toy_dataset_registers_its_sources() -> None:
    assert len(list(PROMPT_SOURCES["scenes"](3, 0))) == 3
    assert [example.caption for example in IMAGE_SOURCES["scenes"](2, 0)]
    assert EVAL_DATASETS["scenes"]().size == (64, 64)
    assert (TEACHERS["scenes"] / "model_index.json").exists()


def test_everything_else_imports_and_runs_without_worlds(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(SOURCE, tmp_path / "distill", ignore=shutil.ignore_patterns("worlds", "__pycache__"))
    modules = [module.name for module in pkgutil.walk_packages([str(tmp_path / "distill")], "distill.")]
    modules = [name for name in modules if not name.endswith("__main__")]
    assert "distill.run" in modules
    assert not any(name.startswith("distill.worlds") for name in modules)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    values = {"teacher": teacher, "prompts.source": prompts, "images": 4, "batch": 4, "method.fake_steps": 1}
    run = ["run", "scenes-debug", "--out", tmp_path / "run", *(f"--set={key}={value}" for key, value in values.items())]
    command = [sys.executable, "-c", SCRIPT, " ".join(modules), *map(str, run)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "student" / "onestep.json").exists()
