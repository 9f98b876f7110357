"""The evaluator of any teacher, without external weights: a student's images against the teacher's own.

Both make images of the same prompts and seeds. Features are few, because an evaluation has some hundred images and a
Frechet distance needs more images than features: mean, standard deviation and roughness of each channel of the
teacher's latents in 2 x 2 cells, 192 for Stable Diffusion 3. The mean sees colors and layout, the standard deviation
contrast, the roughness detail, which blurred images lack. They do not see what an image shows: a CLIP score does.
Features are standardized by mean and standard deviation of the teacher's, so that each counts alike for any teacher.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from distill.evaluate import metrics
from distill.evaluate.base import Encode, Generate, Images, Report
from distill.evaluate.evaluator import Evaluation, digest_of
from distill.evaluate.grid_artifacts import grid_energy
from distill.evaluate.metrics import Features
from distill.evaluate.references import REPEAT_SEEDS, References
from distill.evaluate.top_tiles import TopTiles
from distill.report.grid import labeled_grid, tile

if TYPE_CHECKING:
    from distill.evaluate.clip import Clip

FEATURES = "vae-latents-2x2-mean-std-roughness"
CELLS = 2  # per side of an image
HIGHER_IS_BETTER = {"kernel": False, "frechet": False, "clip_score": True}  # metrics that may decide


@dataclass(frozen=True)
class _Measured:
    """What is known of each image, in order."""

    features: Features  # (N, D), not standardized
    saturation: NDArray[np.float64]
    grid: NDArray[np.float64]
    clip: NDArray[np.float64]  # empty without a CLIP model

    def standardize(self, features: Features) -> Features:
        """Subtract the mean of these images' features, and divide by their standard deviation: (N, D)."""
        center, scale = self._center_and_scale
        return np.asarray((features - center) / scale)

    @cached_property
    def _center_and_scale(self) -> tuple[Features, Features]:
        spread = self.features.std(axis=0)
        return self.features.mean(axis=0), np.where(spread > 1e-6, spread, 1)


class ReferenceEvaluator:
    """Compares a model with `references`; the kernel distance decides, because few images do not bias it.

    With a CLIP model, `clip_score` is measured too and may decide.
    """

    def __init__(self, references: References, clip: "Clip | None" = None, metric: str = "kernel") -> None:
        self._references = references
        self._clip = clip
        self._teacher: _Measured | None = None
        self.metric = metric
        self.higher_is_better = HIGHER_IS_BETTER[metric]
        self.prompts: Sequence[str] = references.texts
        self.count = len(references.texts)
        self.digest = digest_of({"references": references.digest, "clip": clip and clip.digest, "metric": metric})

    def evaluate(self, generate: Generate, encode: Encode, report: Report = lambda n: None) -> Evaluation:
        if self._teacher is None:
            batches = self._references.batches()
            self._teacher = self._measure(map(self._references.read, batches), encode)
        worst = TopTiles()
        student = self._measure(self._generated(generate, report), encode, worst)
        return self._compare(student, self._teacher, worst)

    def _generated(self, generate: Generate, report: Report) -> Iterator[Images]:
        for batch in self._references.batches():
            images = generate(self._references.texts[batch], self._references.seeds[batch])
            report(len(images))
            yield images

    def _measure(self, batches: Iterator[Images], encode: Encode, worst: TopTiles | None = None) -> _Measured:
        """Measure batches one by one: of each image, only the numbers are kept. A student's also go to `worst`."""
        parts: list[_Measured] = []
        for images, batch in zip(batches, self._references.batches(), strict=True):
            texts = self._references.texts[batch]
            scores = np.zeros(0) if self._clip is None else self._clip.scores(images, texts)
            parts.append(
                _Measured(
                    cell_features(encode(images)),
                    np.array([metrics.saturation(image) for image in images]),
                    grid_energy(images, self._references.period),
                    scores,
                )
            )
            if worst is not None:
                worst.add(batch.start, self._distances(parts[-1].features, batch.start), images)
        names = ("features", "saturation", "grid", "clip")
        return _Measured(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def _distances(self, features: Features, first: int) -> NDArray[np.float64]:
        """Distances to the teacher's images of the same prompts and seeds, without those for diversity: (N,)."""
        assert self._teacher is not None  # it is measured before a student
        count = max(0, min(len(features), self._references.images - first))
        pair = features[:count], self._teacher.features[first : first + count]
        made, real = map(self._teacher.standardize, pair)
        return np.asarray(np.linalg.norm(made - real, axis=1))

    def _compare(self, student: _Measured, teacher: _Measured, worst: TopTiles) -> Evaluation:
        images = self._references.images
        made, real = (teacher.standardize(each.features) for each in (student, teacher))
        spreads = [metrics.diversity(each[images:].reshape(-1, REPEAT_SEEDS, each.shape[1])) for each in (made, real)]
        found = {
            "kernel": metrics.paired_kernel(made[:images], real[:images]),
            "frechet": metrics.frechet(made[:images], real[:images]),
            "relative_diversity": spreads[0] / spreads[1] if spreads[1] else 1.0,
            "grid": float(student.grid.mean() / teacher.grid.mean()),
            "saturation": float(student.saturation.mean()),
        }
        own = {"kernel": 0.0, "frechet": 0.0, "relative_diversity": 1.0, "grid": 1.0}
        own["saturation"] = float(teacher.saturation.mean())
        if self._clip is not None:
            found["clip_score"], own["clip_score"] = (float(each.clip[:images].mean()) for each in (student, teacher))

        indices, tiles = worst.ordered()
        teacher_tiles = np.stack([tile(self._references.read(slice(i, i + 1))[0]) for i in indices])
        rows = [("teacher", teacher_tiles), ("student", tiles)]
        return Evaluation(found, own, labeled_grid(rows, [self._references.texts[i] for i in indices]))


def cell_features(latents: torch.Tensor) -> Features:
    """Mean, standard deviation and roughness of each channel in CELLS x CELLS cells of latents (N, C, h, w): (N, D).

    Roughness is the root mean square of half the differences between neighbors, in both directions.
    """
    x = latents.double().cpu()
    mean, square = (F.adaptive_avg_pool2d(y, CELLS) for y in (x, x**2))
    across, down = (F.adaptive_avg_pool2d(x.diff(dim=dim) ** 2, CELLS) for dim in (-1, -2))
    deviation, roughness = (square - mean**2).clamp(min=0).sqrt(), ((across + down) / 4).sqrt()
    return np.asarray(torch.cat([y.flatten(1) for y in (mean, deviation, roughness)], dim=1).numpy())
