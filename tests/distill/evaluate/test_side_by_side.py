"""`distill evaluate`: what it prints and writes, and which models it refuses."""

import json
from pathlib import Path

import pytest
import torch
from tiny import make_teacher
from typer.testing import CliRunner

from distill.cli import app
from distill.errors import SizeError
from distill.evaluate.base import FEATURES
from distill.evaluate.sampler import Sampling
from distill.evaluate.side_by_side import Comparison
from distill.models.sd3_folder import SD3Folder
from distill.models.teacher import TEACHERS
from distill.pipeline import SHIPPED_STUDENT
from distill.worlds.scenes.captions import TASKS
from distill.worlds.scenes.evaluator import ScenesEvaluator


def evaluate(picture: Path, *arguments: str) -> str:
    """The output of the command for one prompt per task, with an unguided teacher of one step."""
    words = ["evaluate", "--per-task", "1", "--steps", "1", "--guidance", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "--picture", str(picture), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size
    return result.stdout


def test_json_holds_every_metric_and_further_samplings_of_the_teacher(tmp_path: Path) -> None:
    found = json.loads(evaluate(tmp_path / "picture.png", "--json", "--teacher-steps", "1,2"))
    assert found["features"] == FEATURES
    assert found["split"] == "held-out"
    assert list(found["teacher"])[:6] == ["overall", "tasks", "frechet", "diversity", "nfe", "seconds_per_image"]
    assert found["student"].keys() == found["teacher"].keys() >= {"kernel", "recall", "coverage", "saturation"}
    assert found["student"]["intervals"].keys() == {"overall", *TASKS, "kernel", "diversity"}
    # The first sampling, one step, is not repeated.
    assert [(each["steps"], each["guidance"], each["nfe"]) for each in found["teachers"]] == [(2, 1, 2)]


def test_both_splits_are_tables_with_intervals(tmp_path: Path) -> None:
    text = evaluate(tmp_path / "picture.png", "--split", "both")
    assert text.index("held-out prompts") < text.index("seen prompts")
    assert FEATURES in text
    assert "±" in text


def test_the_default_guidance_is_the_folders_and_costs_two_evaluations_per_step() -> None:
    comparison = Comparison(
        SD3Folder.read(TEACHERS["scenes"]), {}, [(4, None), (4, 1.0)], ScenesEvaluator(), torch.device("cpu")
    )
    guided, free = (
        Sampling(4, json.loads((TEACHERS["scenes"] / "onestep.json").read_text())["guidance"]),
        Sampling(4, 1),
    )
    assert comparison.samplings == [guided, free]
    assert (guided.nfe, free.nfe) == (8, 4)


def test_a_teacher_of_another_size_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    small = make_teacher(tmp_path / "small")
    with pytest.raises(SizeError, match="distill geneval"):
        Comparison(
            SD3Folder.read(small), {"student": SHIPPED_STUDENT}, [(1, None)], ScenesEvaluator(), torch.device("cpu")
        )
