"""Distances between sets of images on features (N, D) in float64, with NumPy and SciPy only.

`made` images are compared with `real` ones, the reference. Metrics of pairs are computed in blocks of rows, so that
their memory does not grow with the number of pairs.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.spatial.distance import cdist, pdist

Features = NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 1000
CONFIDENCE = 0.95
BLOCK = 1 << 24  # pairs in memory at once: 134 MB, all pairs of 4096 images


def frechet(a: Features, b: Features) -> float:
    """Compute the Frechet distance of Gaussians fitted to two sets: |mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^1/2).

    The trace of the root comes from the eigenvalues of the symmetric A^1/2 B A^1/2, so that singular covariances of few
    samples give real numbers. The estimate is biased upwards for few samples: compare equal counts only.
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = linalg.eigh(np.atleast_2d(cov_a))
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    shared = np.sqrt(np.clip(linalg.eigvalsh(root @ np.atleast_2d(cov_b) @ root), 0, None)).sum()
    offset = a.mean(axis=0) - b.mean(axis=0)
    return float(offset @ offset + np.trace(np.atleast_2d(cov_a)) + np.trace(np.atleast_2d(cov_b)) - 2 * shared)


def kernel(made: Features, real: Features) -> float:
    """Compute the kernel distance: unbiased MMD^2 with the kernel (x.y / D + 1)^3 (Binkowski et al., arXiv 1801.01401).

    Its expectation is 0 for equal distributions at any sample size, so that single values may be negative.
    """
    return float(_mmd(made, real, np.ones((1, len(made))), np.ones((1, len(real))))[0])


def kernel_interval(made: Features, real: Features, seed: int) -> Interval:
    """Compute the bootstrap interval of `kernel`; both sets are resampled independently.

    An image that is drawn twice is not paired with itself, which would bias the distance. A sample of one image alone,
    which a few images may give, has no pairs and is left out.
    """
    rng = np.random.default_rng(seed)
    counts = [rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float) for n in (len(made), len(real))]
    with np.errstate(divide="ignore", invalid="ignore"):
        distances = _mmd(made, real, *counts)
    return _quantiles(distances[np.isfinite(distances)])


def paired_kernel(made: Features, real: Features) -> float:
    """Compute the kernel distance of images of the same prompts and seeds: `kernel` without the pairs (made i, real i).

    These depend on each other. Without them the estimate is unbiased, and 0 for equal sets (Gretton et al., JMLR 2012,
    lemma 6).
    """
    count, total = len(made), 0.0
    for rows in _blocks(count, count):
        h = _cubic(made[rows], made)
        h += _cubic(real[rows], real)
        h -= _cubic(made[rows], real)
        h -= _cubic(made, real[rows]).T
        total += h.sum() - np.trace(h, offset=rows.start)
    return float(total / (count * (count - 1)))


def cmmd(made: Features, real: Features) -> float:
    """Compute CMMD: 1000 MMD^2 with the kernel exp(-|x - y|^2 / (2 10^2)) (Jayasumana et al., arXiv 2401.09603).

    It takes CLIP embeddings of length 1. As in the authors' code, pairs of an image with itself count. The distance of
    a set to itself is therefore 0, and the estimate is biased upwards for few images.
    """

    def k(x: Features, y: Features) -> float:
        sums = (np.exp(-cdist(x[rows], y, "sqeuclidean") / (2 * 10**2)).sum() for rows in _blocks(len(x), len(y)))
        return float(sum(sums) / (len(x) * len(y)))

    return 1000 * (k(made, made) + k(real, real) - 2 * k(made, real))


def precision_recall(made: Features, real: Features, k: int = 3) -> tuple[float, float]:
    """Compute precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

    Precision is the share of made images within the radius of a real one, recall the reverse. The radius of an image is
    the distance to its k-th nearest neighbor in its own set.
    """
    made_radii, real_radii = _radii(made, k), _radii(real, k)
    precise, recalled = 0, np.zeros(len(real), bool)
    for rows in _blocks(len(made), len(real)):
        between = cdist(made[rows], real)
        precise += (between <= real_radii).any(axis=1).sum()
        recalled |= (between <= made_radii[rows, None]).any(axis=0)
    return float(precise / len(made)), float(recalled.mean())


def density_coverage(made: Features, real: Features, k: int = 5) -> tuple[float, float]:
    """Compute density and coverage (Naeem et al., arXiv 2002.09797).

    Density is the mean number of real images whose radius holds a made one, divided by k; it may exceed 1. Coverage is
    the share of real images whose radius holds a made one. Both are robust to outliers among the real images.
    """
    radii, pairs, covered = _radii(real, k), 0, np.zeros(len(real), bool)
    for rows in _blocks(len(made), len(real)):
        within = cdist(made[rows], real) <= radii
        pairs += within.sum()
        covered |= within.any(axis=0)
    return float(pairs / len(made) / k), float(covered.mean())


def diversity(groups: NDArray[np.float64]) -> float:
    """Compute the mean RMS difference per feature of two images of a prompt; features are (prompts, seeds, D)."""
    return float(np.mean(spreads(groups)))


def spreads(groups: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the diversity of each prompt: (prompts,)."""
    means = np.array([pdist(group).mean() for group in groups])
    return np.asarray(means / np.sqrt(groups.shape[-1]))


def saturation(images: NDArray[np.uint8]) -> float:
    """Compute the share of 8-bit values that are 0 or 255."""
    return float(np.mean((images == 0) | (images == 255)))


def interval(groups: Sequence[NDArray[np.float64]], seed: int) -> Interval:
    """Compute the bootstrap interval of the mean of the groups' means; a group holds one value per prompt."""
    rng = np.random.default_rng(seed)
    means = [rng.choice(group, (RESAMPLES, len(group))).mean(axis=1) for group in groups]
    return _quantiles(np.mean(means, axis=0))


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Divide the rows of a matrix into blocks of at most BLOCK elements, or one row."""
    step = max(1, BLOCK // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _quantiles(values: NDArray[np.float64]) -> Interval:
    """Central interval of the resampled values at the level CONFIDENCE."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _cubic(x: Features, y: Features) -> Features:
    """The cubic kernel (M, N) of images (M, D) and (N, D)."""
    k: Features = x @ y.T
    k /= x.shape[1]
    k += 1
    k **= 3
    return k


def _mmd(made: Features, real: Features, a: Features, b: Features) -> NDArray[np.float64]:
    """Unbiased MMD^2 (R,) with the cubic kernel, in which image i of the sets counts a[r, i] and b[r, i] times."""

    def pairs(x: Features, y: Features, x_counts: Features, y_counts: Features) -> tuple[Features, Features]:
        """Sum the kernel over all pairs (R,), and list it for the pairs of equal index."""
        sums, diagonal = np.zeros((len(x_counts), len(y))), []
        for rows in _blocks(len(x), len(y)):
            kernel = _cubic(x[rows], y)
            sums += x_counts[:, rows] @ kernel
            diagonal.append(np.diagonal(kernel, rows.start).copy())  # a view would keep the block
        return np.asarray((sums * y_counts).sum(axis=1)), np.concatenate(diagonal)

    def within(images: Features, counts: Features) -> NDArray[np.float64]:
        total, itself = pairs(images, images, counts, counts)
        squares = counts**2
        return np.asarray((total - squares @ itself) / (counts.sum(axis=1) ** 2 - squares.sum(axis=1)))

    between = pairs(made, real, a, b)[0] / (a.sum(axis=1) * b.sum(axis=1))
    return np.asarray(within(made, a) + within(real, b) - 2 * between)


def _radii(points: Features, k: int) -> NDArray[np.float64]:
    """Distance (N,) of each point to its k-th nearest neighbor in the set, or to the farthest if there are fewer."""
    nearest = min(k, len(points) - 1)  # 0 is the point itself
    radii = np.empty(len(points))
    for rows in _blocks(len(points), len(points)):
        radii[rows] = np.partition(cdist(points[rows], points), nearest, axis=1)[:, nearest]
    return radii
