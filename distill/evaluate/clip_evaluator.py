"""The evaluator by a CLIP model alone, which needs no images of the teacher."""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING

import numpy as np

from distill.evaluate import metrics
from distill.evaluate.base import Encode, Generate, Report
from distill.evaluate.evaluator import Evaluation, digest_of
from distill.evaluate.references import BATCH
from distill.evaluate.top_tiles import TopTiles
from distill.report.grid import labeled_grid

if TYPE_CHECKING:
    from distill.evaluate.clip import Clip


class ClipEvaluator:
    """Scores images of prompts, which are repeated with other seeds if there are fewer than `images`."""

    metric = "clip_score"
    higher_is_better = True

    def __init__(self, clip: "Clip", prompts: Sequence[str], images: int) -> None:
        self._clip = clip
        self.prompts: Sequence[str] = list(islice(cycle(prompts), images))
        self.count = images
        self.digest = digest_of({"clip": clip.digest, "prompts": self.prompts})

    def evaluate(self, generate: Generate, encode: Encode, report: Report = lambda n: None) -> Evaluation:
        scores, saturation, lowest = [], [], TopTiles()
        for start in range(0, self.count, BATCH):
            texts = self.prompts[start : start + BATCH]
            images = generate(texts, range(start, start + len(texts)))
            report(len(images))
            scores.append(self._clip.scores(images, texts))
            saturation += [metrics.saturation(image) for image in images]
            lowest.add(start, -scores[-1], images)
        indices, tiles = lowest.ordered()
        picture = labeled_grid([("student", tiles)], [self.prompts[i] for i in indices])
        found = {"clip_score": float(np.concatenate(scores).mean()), "saturation": float(np.mean(saturation))}
        return Evaluation(found, picture=picture)
