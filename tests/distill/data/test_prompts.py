"""Sources of prompts, and their distinct prompts."""

import pytest

from distill import worlds  # noqa: F401  adds its sources
from distill.data.prompts import DistinctPrompts, read_prompts
from distill.worlds.scenes.captions import NUMBERS


def test_the_toy_dataset_is_a_source_that_depends_on_its_seed() -> None:
    once = list(read_prompts("scenes", count=5, seed=3))
    assert len(once) == 5
    assert once == list(read_prompts("scenes", count=5, seed=3)) != list(read_prompts("scenes", count=5, seed=4))


def test_a_fourth_of_the_hard_prompts_count_objects() -> None:
    prompts = list(read_prompts("scenes-hard", count=4000, seed=3))
    counting = sum(any(f"{number} " in prompt for number in NUMBERS.values()) for prompt in prompts)
    assert counting / len(prompts) == pytest.approx(0.24, abs=0.03)
    assert prompts[:5] == list(read_prompts("scenes-hard", count=5, seed=3))


def test_each_different_prompt_comes_once_and_a_beginning_is_known_again() -> None:
    whole, skipped = DistinctPrompts(["a", "b", "a", "c", "b"]), DistinctPrompts(["a", "b", "a", "d", "b"])
    assert list(whole) == ["a", "b", "c"]
    assert (whole.read, whole.repeated) == (5, 2)
    skipped.skip(3)
    beginning = DistinctPrompts(["a", "b", "a"])
    beginning.skip(9)
    assert (skipped.read, skipped.sha256) == (beginning.read, beginning.sha256) == (3, beginning.sha256)
    assert list(skipped) == ["d"]
    assert skipped.sha256 != whole.sha256
