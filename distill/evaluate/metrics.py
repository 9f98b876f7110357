"""Distances between sets of images, on features (N, D) in float64. No framework, no model."""

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.spatial.distance import pdist

Features = NDArray[np.float64]


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


def diversity(groups: NDArray[np.float64]) -> float:
    """Mean distance between two images of the same prompt, for features (prompts, seeds, D).

    Euclidean, divided by sqrt(D): the root mean square difference per feature. 0 when a seed changes nothing.
    """
    return float(np.mean([pdist(group).mean() for group in groups]) / np.sqrt(groups.shape[-1]))
