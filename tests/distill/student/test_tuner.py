"""The tuner's choice of batch sizes: by time, and by the bits that they compute."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill.pipeline import OneStepPipeline, RuntimeOptions
from distill.student.tuner import WASTE, Tuner

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seconds", "batch"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0}, 1),  # nothing is gained
        ({1: 1.0, 2: 0.6, 4: 0.5, 8: 0.45}, 2 if WASTE * 0.45 >= 0.6 else 4),
        ({1: 1.0, 2: 0.5, 4: 0.25, 8: 0.125}, 8),
        ({1: 1.0, 2: 1.1}, 1),  # and larger ones are not tried
        ({1: 1.0, 2: 1.02, 4: 0.5, 8: 0.5}, 4),  # noise ends nothing
    ],
)
def test_the_batch_is_the_smallest_that_takes_little_more_for_each_image_than_the_best(
    seconds: dict[int, float], batch: int, student: Path
) -> None:
    tuner = Tuner(student, CPU, RuntimeOptions(), 16, 60.0)
    assert tuner.smallest("network", (4,), seconds.__getitem__, max(seconds))[0] == (batch,)


def test_batch_sizes_that_compute_other_bits_than_the_chosen_one_are_left_out(student: Path) -> None:
    pipeline = OneStepPipeline.load(student)
    tuner = Tuner(student, CPU, RuntimeOptions(), 16, 60.0)

    def inputs(rows: int) -> Callable[[], torch.Tensor]:
        return lambda: torch.arange(rows) * (1.0 if pipeline.choice.text[0] in (4, 8) else 1.0 + torch.finfo().eps)

    assert tuner.equal(pipeline, inputs, 8, (1, 2, 4, 8)) == (4, 8)
    assert tuner.equal(pipeline, inputs, 2, (1, 2, 4, 8)) == (1, 2)
    assert tuner.equal(pipeline, inputs, 4, ()) == (4,)
    assert tuner.equal(pipeline, lambda rows: lambda: torch.zeros(rows), 8, (4, 8)) == (8,)  # which shows nothing
