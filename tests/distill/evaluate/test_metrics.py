"""Distances against closed forms and independent implementations; what `distill evaluate` prints and writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from tiny import make_teacher
from typer.testing import CliRunner

from distill.cli import app
from distill.errors import SizeError
from distill.evaluate.base import FEATURES
from distill.evaluate.metrics import (
    density_coverage,
    diversity,
    frechet,
    interval,
    kernel,
    kernel_interval,
    precision_recall,
    saturation,
)
from distill.evaluate.sampler import Setting
from distill.evaluate.side_by_side import SHIPPED_TEACHER, Comparison
from distill.models.sd3_folder import SD3Folder
from distill.pipeline import SHIPPED_STUDENT
from distill.worlds.scenes.captions import TASKS
from distill.worlds.scenes.evaluator import SceneEvaluator


def gaussian(count: int, width: int = 4, mean: float = 0, std: float = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, std, (count, width))


def test_frechet_distance_is_the_textbook_formula() -> None:
    a, b = gaussian(50, seed=1), gaussian(60, mean=0.5, std=2, seed=2) @ gaussian(4, seed=3)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet(a, b) == pytest.approx(expected)
    assert frechet(a, a + 3) == pytest.approx(4 * 3**2)  # only the means differ


def mmd(made: np.ndarray, real: np.ndarray) -> float:
    """The unbiased estimate as it is defined, pair by pair."""

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def within(points: np.ndarray) -> float:
        return np.mean([k(x, y) for i, x in enumerate(points) for j, y in enumerate(points) if i != j])

    return within(made) + within(real) - 2 * np.mean([k(x, y) for x in made for y in real])


def test_kernel_distance_is_the_mean_over_pairs_and_has_no_bias() -> None:
    made, real = gaussian(9, seed=1), gaussian(7, mean=1, seed=2)
    assert kernel(made, real) == pytest.approx(mmd(made, real))
    equal = [kernel(gaussian(12, seed=i), gaussian(12, seed=1000 + i)) for i in range(400)]
    assert abs(np.mean(equal)) < 3 * stats.sem(equal)


def test_kernel_interval_holds_the_true_distance_about_as_often_as_it_says() -> None:
    # In one dimension, N(1, 1) against N(0, 1): E (x y + 1)^3 from the moments E x = 1, E x^2 = 2, E x^3 = 4.
    true = (4 * 4 + 3 * 2 * 2 + 3 * 1 + 1) + (0 + 3 * 1 + 0 + 1) - 2 * (0 + 3 * 2 * 1 + 0 + 1)
    held = 0
    for i in range(60):
        low, high = kernel_interval(gaussian(60, 1, mean=1, seed=i), gaussian(60, 1, seed=500 + i), seed=i)
        held += low <= true <= high
    assert 48 <= held <= 60


def reached(point: np.ndarray, points: np.ndarray, k: int) -> list[bool]:
    """For each of `points`, whether `point` lies within the distance to its k-th nearest neighbor."""
    found = []
    for i, center in enumerate(points):
        others = sorted(np.linalg.norm(center - other) for j, other in enumerate(points) if j != i)
        found.append(bool(np.linalg.norm(center - point) <= others[k - 1]))
    return found


def test_neighborhood_figures_are_their_definitions() -> None:
    made, real = gaussian(23, mean=0.8, std=0.7, seed=1), gaussian(19, seed=2)
    precision = np.mean([any(reached(x, real, 3)) for x in made])
    recall = np.mean([any(reached(y, made, 3)) for y in real])
    assert precision_recall(made, real) == pytest.approx((precision, recall))
    hits = np.array([reached(x, real, 5) for x in made])  # (made, real)
    assert density_coverage(made, real) == pytest.approx((hits.sum() / (5 * len(made)), hits.any(axis=0).mean()))
    assert 0 < precision < 1  # the sets neither match nor miss each other
    assert 0 < recall < 1


def test_collapse_is_precise_and_covers_nothing_and_noise_is_the_reverse() -> None:
    real = gaussian(200, 8, seed=1)
    collapsed = real[:1] + gaussian(200, 8, std=1e-3, seed=2)
    assert precision_recall(collapsed, real) == (1, 1 / 200)  # only the image that they repeat
    assert density_coverage(collapsed, real)[1] < 0.1
    wide = gaussian(200, 8, std=5, seed=3)
    precision, recall = precision_recall(wide, real)
    assert precision < 0.1
    assert recall > 0.9


def test_diversity_and_saturation_are_their_closed_forms() -> None:
    groups = np.zeros((2, 2, 9))
    groups[0, 1], groups[1, 1] = 2, 4  # two seeds apart by 2 and by 4 in every feature
    assert diversity(groups) == pytest.approx(3)
    image = np.full((1, 2, 2, 3), 128, np.uint8)
    image[0, 0, 0] = (0, 255, 1)
    assert saturation(image) == 2 / 12


def test_intervals_agree_with_scipy_and_need_no_spread() -> None:
    groups = [gaussian(40, 1, seed=1)[:, 0], gaussian(90, 1, mean=3, seed=2)[:, 0]]

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return (a.mean(axis=axis) + b.mean(axis=axis)) / 2

    theirs = stats.bootstrap(groups, statistic, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    ours = interval(groups, seed=0)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03)
    assert ours == interval(groups, seed=0) != interval(groups, seed=1)
    assert interval([np.ones(1)], seed=0) == (1, 1)


def evaluate(picture: Path, *arguments: str) -> str:
    """What the command prints of one prompt a task, against an unguided teacher of one step."""
    words = ["evaluate", "--per-task", "1", "--steps", "1", "--guidance", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "--picture", str(picture), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size
    return result.stdout


def test_json_holds_every_figure_and_teachers_in_further_settings(tmp_path: Path) -> None:
    found = json.loads(evaluate(tmp_path / "picture.png", "--json", "--teacher-steps", "1,2"))
    assert found["features"] == FEATURES
    assert found["split"] == "held-out"
    assert list(found["teacher"])[:6] == ["overall", "tasks", "frechet", "diversity", "nfe", "seconds_per_image"]
    assert found["student"].keys() == found["teacher"].keys() >= {"kernel", "recall", "coverage", "saturation"}
    assert found["student"]["intervals"].keys() == {"overall", *TASKS, "kernel", "diversity"}
    # The measure itself, one step, is not repeated.
    assert [(each["steps"], each["guidance"], each["nfe"]) for each in found["teachers"]] == [(2, 1, 2)]


def test_both_splits_are_tables_with_intervals(tmp_path: Path) -> None:
    text = evaluate(tmp_path / "picture.png", "--split", "both")
    assert text.index("held-out prompts") < text.index("seen prompts")
    assert FEATURES in text
    assert "±" in text


def test_guidance_is_the_folders_where_none_is_asked_and_costs_two_calls_a_step() -> None:
    comparison = Comparison(SD3Folder.read(SHIPPED_TEACHER), {}, [(4, None), (4, 1.0)], torch.device("cpu"))
    guided, free = (Setting(4, json.loads((SHIPPED_TEACHER / "onestep.json").read_text())["guidance"]), Setting(4, 1))
    assert comparison.settings == [guided, free]
    assert (guided.nfe, free.nfe) == (8, 4)


def test_a_teacher_of_another_size_is_named_before_it_is_loaded(tmp_path: Path) -> None:
    small = make_teacher(tmp_path / "small")
    with pytest.raises(SizeError, match="distill geneval"):
        Comparison(SD3Folder.read(small), {"student": SHIPPED_STUDENT}, [(1, None)], torch.device("cpu"))


def test_splits_share_no_combination() -> None:
    seen, held_out = (SceneEvaluator().prompts(20, 0, split) for split in (False, True))
    assert not {p.combination() for p in seen.prompts} & {p.combination() for p in held_out.prompts}
