"""Distances between sets of images, on features (N, D) in float64. No framework, no model.

Sets of `made` images are held against sets of `real` ones, which are whatever the caller takes as the truth. All
pairs of distances are held at once: 10 000 images a set take about a gigabyte.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.spatial.distance import cdist, pdist, squareform

Features = NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 1000
CONFIDENCE = 0.95


def frechet(a: Features, b: Features) -> float:
    """Frechet distance between Gaussians fitted to two feature sets: |mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^1/2).

    The trace of the root comes from the eigenvalues of A^1/2 B A^1/2, which is symmetric, so that covariances of
    few samples (singular ones) give no complex numbers. Biased upwards for few samples: compare equal counts only.
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = linalg.eigh(np.atleast_2d(cov_a))
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    shared = np.sqrt(np.clip(linalg.eigvalsh(root @ np.atleast_2d(cov_b) @ root), 0, None)).sum()
    offset = a.mean(axis=0) - b.mean(axis=0)
    return float(offset @ offset + np.trace(np.atleast_2d(cov_a)) + np.trace(np.atleast_2d(cov_b)) - 2 * shared)


def kernel(made: Features, real: Features) -> float:
    """Kernel distance: MMD^2 with the kernel (x.y / D + 1)^3 (Binkowski et al., arXiv 1801.01401), without bias.

    Its expectation is 0 for equal distributions at any sample size, so single values may lie below.
    """
    return float(_mmd(*_cubic(made, real), np.ones((1, len(made))), np.ones((1, len(real))))[0])


def kernel_interval(made: Features, real: Features, seed: int) -> Interval:
    """Bootstrap interval of `kernel`; both sets are resampled, each on its own.

    An image drawn twice makes no pair with itself, which would look like a closeness that is not there.
    """
    rng = np.random.default_rng(seed)
    counts = [rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float) for n in (len(made), len(real))]
    return _quantiles(_mmd(*_cubic(made, real), *counts))


def cmmd(made: Features, real: Features) -> float:
    """CMMD: 1000 MMD^2 with the kernel exp(-|x - y|^2 / (2 10^2)) (Jayasumana et al., arXiv 2401.09603).

    For CLIP embeddings of length 1. As in the authors' code the pairs of an image with itself count too, so that it
    is 0 for a set against itself, and for few images larger than the distance it stands for.
    """

    def k(x: Features, y: Features) -> float:
        return float(np.exp(-cdist(x, y, "sqeuclidean") / (2 * 10**2)).mean())

    return 1000 * (k(made, made) + k(real, real) - 2 * k(made, real))


def precision_recall(made: Features, real: Features, k: int = 3) -> tuple[float, float]:
    """Share of made images within the real ones' reach, and of real within the made ones'.

    An image's reach is the distance to its k-th nearest neighbor in its own set (Kynkaanniemi et al., arXiv
    1904.06991).
    """
    between = cdist(made, real)
    precision = (between <= _reach(real, k)).any(axis=1).mean()
    recall = (_reach(made, k) >= between.T).any(axis=1).mean()
    return float(precision), float(recall)


def density_coverage(made: Features, real: Features, k: int = 5) -> tuple[float, float]:
    """How many real images reach a made one, over k; and the share of real images that reach a made one.

    Naeem et al., arXiv 2002.09797: density may exceed 1, and one far real image no longer makes everything precise.
    """
    reached = cdist(made, real) <= _reach(real, k)
    return float(reached.sum(axis=1).mean() / k), float(reached.any(axis=0).mean())


def diversity(groups: NDArray[np.float64]) -> float:
    """Mean distance between two images of the same prompt, for features (prompts, seeds, D).

    Euclidean, divided by sqrt(D): the root mean square difference per feature. 0 when a seed changes nothing.
    """
    return float(np.mean(spreads(groups)))


def spreads(groups: NDArray[np.float64]) -> NDArray[np.float64]:
    """The `diversity` of each prompt (prompts,)."""
    means = np.array([pdist(group).mean() for group in groups])
    return np.asarray(means / np.sqrt(groups.shape[-1]))


def saturation(images: NDArray[np.uint8]) -> float:
    """Share of 8-bit values at an end of their range: where a channel is fully off or on."""
    return float(np.mean((images == 0) | (images == 255)))


def interval(groups: Sequence[NDArray[np.float64]], seed: int) -> Interval:
    """Bootstrap interval of the mean of the groups' means; every group is resampled on its own.

    One value a prompt. Values that are all alike give an interval without width, whatever their number.
    """
    rng = np.random.default_rng(seed)
    means = [rng.choice(group, (RESAMPLES, len(group))).mean(axis=1) for group in groups]
    return _quantiles(np.mean(means, axis=0))


def _quantiles(values: NDArray[np.float64]) -> Interval:
    """The middle CONFIDENCE of resampled values."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _cubic(made: Features, real: Features) -> tuple[Features, Features, Features]:
    """The cubic kernel within the made (M, M), within the real (N, N) and between them (M, N)."""

    def k(x: Features, y: Features) -> Features:
        return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)

    return k(made, made), k(real, real), k(made, real)


def _mmd(aa: Features, bb: Features, ab: Features, a: Features, b: Features) -> NDArray[np.float64]:
    """Unbiased MMD^2 (R,) where image i of the one set counts a[r, i] times, of the other b[r, i] times."""

    def within(kernel: Features, counts: Features) -> NDArray[np.float64]:
        pairs = ((counts @ kernel) * counts).sum(axis=1) - counts**2 @ np.diag(kernel)
        return np.asarray(pairs / (counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)))

    between = ((a @ ab) * b).sum(axis=1) / (a.sum(axis=1) * b.sum(axis=1))
    return np.asarray(within(aa, a) + within(bb, b) - 2 * between)


def _reach(points: Features, k: int) -> NDArray[np.float64]:
    """Distance (N,) of each to its k-th nearest neighbor in the set, the farthest if it has fewer."""
    distances = np.sort(squareform(pdist(points)), axis=1)  # the first of each row is the point itself
    return np.asarray(distances[:, min(k, len(points) - 1)])
