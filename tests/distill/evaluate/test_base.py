"""Evaluators are found by name and image size, and a perfect model has perfect scores."""

import numpy as np
import pytest
import torch

from distill.evaluate.base import DIVERSITY_SEEDS, evaluate
from distill.evaluate.datasets import find_eval_dataset
from distill.models.vae import to_pixels


def test_an_evaluator_is_found_by_name_and_image_size() -> None:
    found = find_eval_dataset(["runs/teacher", "scenes"], (64, 64))
    assert found is not None
    assert found.size == (64, 64)
    assert find_eval_dataset(["scenes"], (32, 32)) is None
    assert find_eval_dataset(["runs/scenes"], (64, 64)) is None


@pytest.mark.parametrize("perfect", [True, False])
def test_real_images_score_one_and_blank_images_zero(perfect: bool) -> None:
    evaluator = find_eval_dataset(["scenes"], (64, 64))
    assert evaluator is not None
    prompts = evaluator.prompts(2, seed=0)
    images = dict(zip(prompts.texts, prompts.real(seed=0), strict=True))
    calls: list[int] = []

    def generate(texts, seeds):
        return np.stack([images[text] if perfect else np.full_like(images[text], 128) for text in texts])

    def encode(batch: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(to_pixels(batch), 8)

    result, generated = evaluate(prompts, generate, 1, encode, seed=0, report=calls.append)
    assert sum(calls) == prompts.count == len(prompts.texts) + DIVERSITY_SEEDS * len(prompts.repeated)
    assert len(generated) == len(prompts.texts)
    assert result.overall == (1.0 if perfect else 0.0)
    assert set(result.tasks.values()) == {result.overall}
    assert result.tasks.keys() == set(prompts.tasks)
    assert result.diversity == 0.0  # the seed has no effect
    assert (result.frechet == pytest.approx(0, abs=1e-6)) is perfect
