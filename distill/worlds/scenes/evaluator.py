"""Teacher and student on the same held-out prompts and seeds of the small world.

Scores come from the scorer of `distill.worlds.scenes`. Distances use features of the teacher's own autoencoder:
latents of the final 8-bit images, averaged over 2 x 2 cells.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from distill.evaluate.metrics import (
    Features,
    Interval,
    density_coverage,
    diversity,
    frechet,
    interval,
    kernel,
    kernel_interval,
    precision_recall,
    saturation,
    spreads,
)
from distill.worlds.scenes.captions import TASKS, Prompt, evaluation_prompts, wording
from distill.worlds.scenes.render import place, render
from distill.worlds.scenes.score import verdicts

Images = NDArray[np.uint8]
Generate = Callable[[Sequence[str], Sequence[int]], Images]  # prompts, seeds -> (N, H, W, 3)
Encode = Callable[[Images], torch.Tensor]  # images -> latents (N, C, h, w)
Report = Callable[[int], None]  # called with the number of images just made

FEATURES = "vae-latents-2x2"  # what distances are taken on, as outputs name it
BATCH = 64
DIVERSITY_SEEDS = 8


@dataclass(frozen=True)
class Judgment:
    """One model's figures. Scores in [0, 1]; `calls` counts evaluations of the network per image.

    `intervals` are those of 95 % of `overall`, each task, `kernel` and `diversity`. The other distances have none:
    an image that resampling draws twice is its own nearest neighbor, and lowers the rank of a covariance.
    """

    overall: float
    tasks: dict[str, float]
    frechet: float
    diversity: float
    calls: int
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


@dataclass(frozen=True)
class Questions:
    """What both models are asked: one image per prompt for scores and distance, several seeds of a few for diversity.

    The seeds of the two parts do not overlap.
    """

    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    repeated: tuple[str, ...]

    @classmethod
    def make(cls, per_task: int, seed: int, held_out: bool = True) -> "Questions":
        """`per_task` prompts of each task from one split; an eighth of them also stand for diversity."""
        rng = np.random.default_rng((seed, 1))
        prompts = tuple(evaluation_prompts(per_task, seed, held_out))
        texts = tuple(wording(prompt, rng) for prompt in prompts)
        few = max(1, per_task // 8)
        repeated = tuple(texts[k * per_task + i] for k in range(len(TASKS)) for i in range(few))
        return cls(prompts, texts, repeated)

    @property
    def count(self) -> int:
        """Images that a model makes for them."""
        return len(self.texts) + len(self.repeated) * DIVERSITY_SEEDS

    def real(self, seed: int) -> Images:
        """A true scene for each prompt."""
        rng = np.random.default_rng((seed, 2))
        return render([place(prompt, rng) for prompt in self.prompts])


def features(images: Images, encode: Encode) -> Features:
    """Latents averaged over 2 x 2 cells, flat: (N, C * h/2 * w/2)."""
    parts = [encode(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    pooled = F.avg_pool2d(torch.cat(parts).float().cpu(), 2)
    return np.asarray(pooled.flatten(1).double().numpy())


def judge(
    questions: Questions,
    generate: Generate,
    calls: int,
    encode: Encode,
    seed: int,
    report: Report = lambda n: None,
) -> tuple[Judgment, Images]:
    """The figures of one model, and its images of `questions.texts` in order."""
    started = time.perf_counter()
    images = _in_batches(generate, questions.texts, range(len(questions.texts)), report)
    first = len(questions.texts)
    seeds = [first + k for k in range(DIVERSITY_SEEDS)] * len(questions.repeated)
    texts = [text for text in questions.repeated for _ in range(DIVERSITY_SEEDS)]
    again = _in_batches(generate, texts, seeds, report)
    seconds = (time.perf_counter() - started) / questions.count

    right = verdicts(questions.prompts, images)
    tasks = {task: float(each.mean()) for task, each in right.items()}
    made, real = features(images, encode), features(questions.real(seed), encode)
    groups = features(again, encode).reshape(len(questions.repeated), DIVERSITY_SEEDS, -1)
    precision, recall = precision_recall(made, real)
    density, coverage = density_coverage(made, real)
    judgment = Judgment(
        overall=float(np.mean(list(tasks.values()))),
        tasks=tasks,
        frechet=frechet(made, real),
        diversity=diversity(groups),
        calls=calls,
        seconds_per_image=seconds,
        kernel=kernel(made, real),
        precision=precision,
        recall=recall,
        density=density,
        coverage=coverage,
        saturation=saturation(images),
        intervals={
            "overall": interval(list(right.values()), seed),
            **{task: interval([each], seed) for task, each in right.items()},
            "kernel": kernel_interval(made, real, seed),
            "diversity": interval([spreads(groups)], seed),
        },
    )
    return judgment, images


def _in_batches(generate: Generate, texts: Sequence[str], seeds: Sequence[int], report: Report) -> Images:
    parts = []
    for i in range(0, len(texts), BATCH):
        parts.append(generate(texts[i : i + BATCH], seeds[i : i + BATCH]))
        report(len(parts[-1]))
    return np.concatenate(parts)
