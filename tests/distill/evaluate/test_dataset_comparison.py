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
from distill.evaluate.dataset_comparison import DatasetComparer
from distill.evaluate.sampler import Sampling, StudentModel
from distill.methods.policies import TeacherGuidance
from distill.models.sd3_folder import SD3Folder
from distill.pipeline import SHIPPED_STUDENT
from distill.worlds.scenes.captions import TASKS
from distill.worlds.scenes.eval_dataset import ScenesEvalDataset

UNGUIDED = Sampling(1, TeacherGuidance(scale=1))


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


def test_a_teacher_of_another_size_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    small = make_teacher(tmp_path / "small")
    with pytest.raises(SizeError, match="give --prompts FILE"):
        DatasetComparer(
            SD3Folder.read(small),
            {"student": StudentModel(SHIPPED_STUDENT)},
            [UNGUIDED],
            ScenesEvalDataset(),
            torch.device("cpu"),
        )


def test_a_guided_step_takes_two_network_evaluations_and_three_with_skipped_layers() -> None:
    skipping = TeacherGuidance(scale=4.5, skip_layers=(7, 8, 9))
    samplings = [Sampling(28, TeacherGuidance(scale=scale)) for scale in (1, 4.5)] + [Sampling(28, skipping)]
    assert [sampling.nfe(shift=3.0) for sampling in samplings] == [28, 56, 61]  # steps 1 to 5 of 0 to 27
    assert [sampling.name for sampling in samplings] == [
        "28 steps, unguided", "28 steps, guidance 4.5", "28 steps, guidance 4.5, skip layers 7, 8, 9",
    ]  # fmt: skip
    assert samplings[2].as_dict() == {"steps": 28, "guidance": 4.5, "skip_layers": [7, 8, 9]}
