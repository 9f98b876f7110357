"""The toy dataset: images show their prompts, and the scorer finds exactly the objects that they show."""

from itertools import combinations

import numpy as np
import pytest

from distill.worlds.scenes.captions import (
    RELATIONS,
    TASKS,
    Prompt,
    Thing,
    all_prompts,
    evaluation_prompts,
    sample_prompt,
    training_prompts,
    vocabulary,
    wording,
)
from distill.worlds.scenes.eval_dataset import ScenesEvalDataset
from distill.worlds.scenes.recipe import ScenesRecipe
from distill.worlds.scenes.render import SIZE, Object, place, render
from distill.worlds.scenes.score import detect, score, verdict
from distill.worlds.scenes.shapes import COLORS, GROUND, PALETTE, SHAPES


def scenes(count: int, seed: int):
    rng = np.random.default_rng(seed)
    prompts = [sample_prompt(rng) for _ in range(count)]
    placed = [place(prompt, rng) for prompt in prompts]
    return prompts, placed, render(placed)


def test_the_scorer_reads_fresh_scenes_as_they_were_drawn():
    prompts, placed, images = scenes(600, seed=11)
    right = [verdict(prompt, found) for prompt, found in zip(prompts, detect(images), strict=True)]
    assert np.mean(right) >= 0.99
    for drawn, found in zip(placed, detect(images[:200]), strict=False):
        drawn, found = sorted(drawn, key=lambda o: (o.x, o.y)), sorted(found, key=lambda o: (o.x, o.y))
        assert [(o.shape, o.color) for o in drawn] == [(o.shape, o.color) for o in found]
        for a, b in zip(drawn, found, strict=True):
            assert abs(a.x - b.x) < 1
            assert abs(a.y - b.y) < 1
            assert abs(a.radius - b.radius) < 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [8.0, 11.0])
def test_every_shape_in_every_color_is_told_from_all_others(shape, radius):
    drawn = [(Object(shape, color, 30.25, 33.5, radius),) for color in COLORS]
    assert [[(o.shape, o.color) for o in found] for found in detect(render(drawn))] == [[(shape, c)] for c in COLORS]


def test_images_that_answer_nothing_score_nothing():
    rng = np.random.default_rng(0)
    prompts = evaluation_prompts(10, seed=0)
    shape = (len(prompts), SIZE, SIZE, 3)
    blank = np.full(shape, GROUND[0], np.uint8)
    noise = rng.integers(0, 256, shape, dtype=np.uint8)
    full = np.broadcast_to(np.uint8(PALETTE["red"]), shape)
    for images in (blank, noise, full):
        assert score(prompts, np.ascontiguousarray(images))["overall"] == 0


def test_a_scene_for_another_prompt_is_wrong():
    red_circle = Prompt("colors", (Thing("circle", "red"),))
    rng = np.random.default_rng(0)
    for other in (Thing("circle", "blue"), Thing("square", "red")):
        scene = place(Prompt("colors", (other,)), rng)
        assert not verdict(red_circle, detect(render([scene]))[0])
    three = Prompt("counting", (Thing("star"),), count=3)
    for count in (2, 4):
        scene = place(Prompt("counting", (Thing("star"),), count=count), rng)
        assert not verdict(three, detect(render([scene]))[0])
    a, b = Thing("star", "red"), Thing("heart", "blue")
    swapped = (Thing("star", "blue"), Thing("heart", "red"))
    assert not verdict(Prompt("color_attr", (a, b)), detect(render([place(Prompt("color_attr", swapped), rng)]))[0])


@pytest.mark.parametrize("relation", RELATIONS)
def test_position_holds_one_way_only(relation):
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[relation]
    things = (Thing("star"), Thing("ring"))
    rng = np.random.default_rng(3)
    for _ in range(20):
        found = detect(render([place(Prompt("position", things, relation=relation), rng)]))[0]
        assert verdict(Prompt("position", things, relation=relation), found)
        assert not verdict(Prompt("position", things, relation=opposite), found)


def test_training_never_sees_what_is_held_out():
    rng = np.random.default_rng(5)
    seen = [sample_prompt(rng) for _ in range(4000)]
    held_out = {prompt.combination() for task in TASKS for prompt in all_prompts(task) if prompt.held_out}
    assert not held_out & {prompt.combination() for prompt in seen}
    assert not held_out & {prompt.combination(colors=False) for prompt in seen if prompt.task != "colors"}
    assert {t.shape for p in seen for t in p.things} == set(SHAPES)
    assert {t.color for p in seen for t in p.things} == {None, *COLORS}
    mirrored = Prompt("position", (Thing("ring"), Thing("star")), relation="right")
    assert mirrored.combination() == Prompt("position", (Thing("star"), Thing("ring")), relation="left").combination()


def test_task_weights_are_the_tasks_shares_of_training_prompts():
    weights = ScenesRecipe(task_weights={"counting": 3, "position": 1}).task_weights
    assert weights == {**dict.fromkeys(TASKS, 0.0), "counting": 0.75, "position": 0.25}
    rng = np.random.default_rng(6)
    tasks = [sample_prompt(rng, weights).task for _ in range(4000)]
    assert {task: tasks.count(task) / 4000 for task in TASKS} == pytest.approx(weights, abs=0.03)
    assert sum(ScenesRecipe().task_weights.values()) == pytest.approx(1)


@pytest.mark.parametrize("held_out", [True, False])
def test_evaluation_asks_every_task_alike_and_keeps_to_its_split(held_out):
    prompts = evaluation_prompts(20, seed=1, held_out=held_out)
    assert [prompt.task for prompt in prompts] == [task for task in TASKS for _ in range(20)]
    assert all(prompt.held_out is held_out for prompt in prompts)
    assert prompts == evaluation_prompts(20, seed=1, held_out=held_out)


def test_words_come_from_the_vocabulary_and_seeds_fix_them():
    texts = training_prompts(2000, seed=2)
    assert texts == training_prompts(2000, seed=2)
    assert {word for text in texts for word in text.split()} == set(vocabulary())
    assert len({wording(prompt, np.random.default_rng(i)) for i in range(30) for prompt in [scenes(1, 9)[0][0]]}) > 1


def test_objects_never_touch_and_pixels_are_reproducible():
    _, placed, images = scenes(300, seed=7)
    assert np.array_equal(images, render(placed))
    for scene in placed:
        for o in scene:
            assert o.radius + 1 <= min(o.x, o.y)
            assert max(o.x, o.y) <= SIZE - o.radius - 1
        for a, b in combinations(scene, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius


def test_shapes_are_anti_aliased_and_cover_their_area():
    circle = render([(Object("circle", "white", 32.0, 32.0, 10.0),)])[0].astype(float)
    alpha = (circle[..., 0] - GROUND[0]) / (PALETTE["white"][0] - GROUND[0])
    assert alpha.sum() == pytest.approx(np.pi * 9.5**2, rel=0.01)  # the circle fills 0.95 of its frame
    assert ((alpha > 0.05) & (alpha < 0.95)).any()


def test_other_sizes_are_refused_by_the_scorer():
    with pytest.raises(ValueError, match="64"):
        detect(np.zeros((1, 32, 32, 3), np.uint8))


def test_splits_share_no_combination() -> None:
    seen, held_out = (ScenesEvalDataset().prompts(20, 0, split) for split in (False, True))
    assert not {p.combination() for p in seen.prompts} & {p.combination() for p in held_out.prompts}
