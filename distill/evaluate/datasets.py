"""Datasets whose prompts can be scored, by the name that a configuration gives. Read without PyTorch.

A world registers its datasets when it is imported.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.evaluate.base import EvalDataset

EVAL_DATASETS: dict[str, Callable[[], "EvalDataset"]] = {}


def find_eval_dataset(names: Iterable[str], size: tuple[int, int]) -> "EvalDataset | None":
    """Return the first registered dataset among `names` that scores images of a size, or None."""
    datasets = (EVAL_DATASETS[name]() for name in names if name in EVAL_DATASETS)
    return next((dataset for dataset in datasets if dataset.size == size), None)
