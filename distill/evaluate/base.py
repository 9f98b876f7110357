"""Evaluation on a dataset with a scorer: its prompts, and the metrics of one model on them.

An `EvalDataset` scores images of one size. It makes `EvalPrompts`, and `evaluate` runs a model on them. Distances use
features of the teacher's own autoencoder: latents of the final 8-bit images, averaged over 2 x 2 cells.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from distill.evaluate import metrics
from distill.evaluate.metrics import Features, Interval

Images = NDArray[np.uint8]
Generate = Callable[[Sequence[str], Sequence[int]], Images]  # prompts, seeds -> (N, H, W, 3)
Encode = Callable[[Images], torch.Tensor]  # images -> latents (N, C, h, w)
Report = Callable[[int], None]  # called with the number of images just generated

FEATURES = "vae-latents-2x2"  # the features of all distances, as outputs name them
BATCH = 64
DIVERSITY_SEEDS = 8


@dataclass(frozen=True)
class EvalPrompts(ABC):
    """The prompts of an evaluation, and the scorer of their images.

    Each of `texts` is generated once, for scores and distances; `tasks` names the task of each. Each of `repeated` is
    generated from several further seeds, for diversity.
    """

    texts: tuple[str, ...]
    tasks: tuple[str, ...]
    repeated: tuple[str, ...]

    @property
    def count(self) -> int:
        """Images that a model generates for them."""
        return len(self.texts) + len(self.repeated) * DIVERSITY_SEEDS

    @abstractmethod
    def scores(self, images: Images) -> dict[str, NDArray[np.float64]]:
        """Scores in [0, 1] of the images of `texts`, by task."""

    @abstractmethod
    def real(self, seed: int) -> Images:
        """A real image for each of `texts`."""


class EvalDataset(Protocol):
    """A dataset whose prompts can be scored. `size` is the width and height of the images that it scores."""

    size: tuple[int, int]

    def prompts(self, per_task: int, seed: int, held_out: bool = True) -> EvalPrompts:
        """Draw `per_task` prompts of each task, from combinations that training never sees or from those it sees."""
        ...


@dataclass(frozen=True)
class EvalResult:
    """The metrics of one model. Scores are in [0, 1]; `nfe` counts network evaluations per image.

    `intervals` are the 95 % intervals of `overall`, each task, `kernel` and `diversity`. The other distances have none:
    an image that resampling draws twice is its own nearest neighbor, and lowers the rank of a covariance.
    """

    overall: float
    tasks: dict[str, float]
    frechet: float
    diversity: float
    nfe: int
    seconds_per_image: float
    kernel: float
    precision: float
    recall: float
    density: float
    coverage: float
    saturation: float
    intervals: dict[str, Interval]

    def as_dict(self) -> dict[str, object]:
        """The form that `--json` prints."""
        return asdict(self)


def evaluate(
    prompts: EvalPrompts, generate: Generate, nfe: int, encode: Encode, seed: int, report: Report = lambda n: None
) -> tuple[EvalResult, Images]:
    """Evaluate one model; return its metrics and its images of `prompts.texts` in order."""
    started = time.perf_counter()
    images = _in_batches(generate, prompts.texts, range(len(prompts.texts)), report)
    first = len(prompts.texts)
    seeds = [first + k for k in range(DIVERSITY_SEEDS)] * len(prompts.repeated)
    texts = [text for text in prompts.repeated for _ in range(DIVERSITY_SEEDS)]
    repeated = _in_batches(generate, texts, seeds, report)
    seconds = (time.perf_counter() - started) / prompts.count

    scores = prompts.scores(images)
    tasks = {task: float(values.mean()) for task, values in scores.items()}
    made, real = features(images, encode), features(prompts.real(seed), encode)
    groups = features(repeated, encode).reshape(len(prompts.repeated), DIVERSITY_SEEDS, -1)
    precision, recall = metrics.precision_recall(made, real)
    density, coverage = metrics.density_coverage(made, real)
    result = EvalResult(
        overall=float(np.mean(list(tasks.values()))),
        tasks=tasks,
        frechet=metrics.frechet(made, real),
        diversity=metrics.diversity(groups),
        nfe=nfe,
        seconds_per_image=seconds,
        kernel=metrics.kernel(made, real),
        precision=precision,
        recall=recall,
        density=density,
        coverage=coverage,
        saturation=metrics.saturation(images),
        intervals={
            "overall": metrics.interval(list(scores.values()), seed),
            **{task: metrics.interval([values], seed) for task, values in scores.items()},
            "kernel": metrics.kernel_interval(made, real, seed),
            "diversity": metrics.interval([metrics.spreads(groups)], seed),
        },
    )
    return result, images


def features(images: Images, encode: Encode) -> Features:
    """Latents averaged over 2 x 2 cells, flat: (N, C * h/2 * w/2)."""
    parts = [encode(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    pooled = F.avg_pool2d(torch.cat(parts).float().cpu(), 2)
    return np.asarray(pooled.flatten(1).double().numpy())


def _in_batches(generate: Generate, texts: Sequence[str], seeds: Sequence[int], report: Report) -> Images:
    parts = []
    for i in range(0, len(texts), BATCH):
        parts.append(generate(texts[i : i + BATCH], seeds[i : i + BATCH]))
        report(len(parts[-1]))
    return np.concatenate(parts)
