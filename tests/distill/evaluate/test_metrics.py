"""Distances agree with closed forms and independent implementations."""

import tracemalloc

import numpy as np
import pytest
from scipy import linalg, stats

from distill.evaluate import metrics
from distill.evaluate.metrics import (
    cmmd,
    density_coverage,
    diversity,
    frechet,
    interval,
    kernel,
    kernel_interval,
    paired_kernel,
    precision_recall,
    saturation,
)


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
    """Compute the unbiased estimate by its definition, pair by pair."""

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def within(points: np.ndarray) -> float:
        return np.mean([k(x, y) for i, x in enumerate(points) for j, y in enumerate(points) if i != j])

    return within(made) + within(real) - 2 * np.mean([k(x, y) for x in made for y in real])


blocks = pytest.mark.parametrize("block", [1, 100, 10**6])  # of 23 x 19 pairs: a row, several rows, all


@blocks
def test_distances_are_means_over_pairs_in_blocks_of_any_size(block, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", block)
    made, real = gaussian(23, mean=0.8, seed=1), gaussian(19, seed=2)
    assert kernel(made, real) == pytest.approx(mmd(made, real))

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return np.mean([np.exp(-((a - b) ** 2).sum() / 200) for a in x for b in y])

    assert cmmd(made, real) == pytest.approx(1000 * (k(made, made) + k(real, real) - 2 * k(made, real)))
    assert cmmd(made, made) == 0
    found = kernel_interval(made, real, 3)
    monkeypatch.undo()
    assert found == pytest.approx(kernel_interval(made, real, 3))


def test_the_interval_of_a_few_images_is_one_of_numbers() -> None:
    """Of 1000 samples of 3 images some repeat one image, which has no other to be paired with."""
    low, high = kernel_interval(gaussian(3, seed=1), gaussian(3, seed=2), seed=0)
    assert -np.inf < low < high < np.inf


def test_kernel_distance_has_no_bias() -> None:
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


@blocks
def test_neighborhood_figures_are_their_definitions_in_blocks_of_any_size(block, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", block)
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


@blocks
def test_the_paired_kernel_distance_leaves_out_pairs_of_one_prompt_in_blocks_of_any_size(block, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", block)
    a, b = gaussian(30, seed=1), gaussian(30, mean=0.2, seed=2)
    k = [[(x @ y / 4 + 1) ** 3 for y in (*a, *b)] for x in (*a, *b)]
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    expected = np.mean([k[i][j] + k[30 + i][30 + j] - k[i][30 + j] - k[j][30 + i] for i, j in pairs])
    assert paired_kernel(a, b) == pytest.approx(expected)
    assert paired_kernel(a, a) == 0


@pytest.mark.parametrize("metric", [paired_kernel, kernel, cmmd, precision_recall, density_coverage])
def test_the_memory_of_metrics_of_pairs_is_bounded(metric, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", 10_000)
    a, b = gaussian(2000, seed=1), gaussian(2000, seed=2)
    tracemalloc.start()
    metric(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 8 * 10_000  # bytes; a matrix of all pairs takes 400 blocks
