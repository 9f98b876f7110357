"""`Evaluator`: measures a model's images. One of its metrics decides which checkpoint of a run is the best."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL.Image import Image

from distill.evaluate.base import Encode, Generate, Report


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a model; `teacher` has those of the teacher's own images, where they are known.

    `picture` shows the prompts on which the model differs most from the teacher.
    """

    metrics: dict[str, float]
    teacher: dict[str, float] = field(default_factory=dict)
    picture: Image | None = None


class Evaluator(Protocol):
    """Measures models on fixed prompts and seeds, the same at every call."""

    metric: str  # decides which checkpoint is the best
    higher_is_better: bool  # of that metric
    digest: str  # identity of all that the metrics depend on besides the model; those of two digests do not compare
    prompts: Sequence[str]  # all that a model gets, so that they can be encoded in advance
    count: int  # images that a model generates

    def evaluate(self, generate: Generate, encode: Encode, report: Report = lambda n: None) -> Evaluation:
        """Generate images and measure them. `encode` is the teacher's; `report` gets the size of each batch."""
        ...


def is_better(evaluator: Evaluator, value: float, best: float) -> bool:
    """Whether a value of the deciding metric is better than the best so far."""
    return value > best if evaluator.higher_is_better else value < best


def digest_of(values: Mapping[str, Any]) -> str:
    """A digest of plain values, the same in every process."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
