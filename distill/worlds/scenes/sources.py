"""The sources that the toy dataset registers: prompts, captioned images and its scorer."""

from collections.abc import Iterator, Mapping
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING

from distill.data.sources import Example

if TYPE_CHECKING:
    from distill.worlds.scenes.captions import Task
    from distill.worlds.scenes.eval_dataset import ScenesEvalDataset
    from distill.worlds.scenes.render import Scene

COUNT = 20_000  # prompts or images if no count is given
HARD: Mapping["Task", float] = {  # shares of the tasks; students err more often where objects are several
    "single_object": 0.08,
    "two_object": 0.22,
    "counting": 0.24,
    "colors": 0.06,
    "position": 0.16,
    "color_attr": 0.24,
}


def scene_prompts(count: int | None, seed: int) -> list[str]:
    """Draw training prompts."""
    from distill.worlds.scenes.captions import training_prompts

    return training_prompts(COUNT if count is None else count, seed)


def hard_scene_prompts(count: int | None, seed: int) -> list[str]:
    """Draw training prompts, more of them of the tasks that students find hard."""
    from distill.worlds.scenes.captions import training_prompts

    return training_prompts(COUNT if count is None else count, seed, HARD)


def scene_images(count: int | None, seed: int) -> Iterator[Example]:
    """Draw captioned scenes. Each depends only on the seed and its index, and is rendered when it is read."""
    import numpy as np

    from distill.worlds.scenes.captions import sample_prompt, wording
    from distill.worlds.scenes.render import place

    for index in range(COUNT if count is None else count):
        rng = np.random.default_rng((seed, index))
        prompt = sample_prompt(rng)
        caption, scene = wording(prompt, rng), place(prompt, rng)
        yield Example(f"scene {index} of seed {seed}", caption, 0, partial(_png, scene), bytes)


def scene_eval_dataset() -> "ScenesEvalDataset":
    """Return the toy dataset with its scorer."""
    from distill.worlds.scenes.eval_dataset import ScenesEvalDataset

    return ScenesEvalDataset()


def _png(scene: "Scene") -> bytes:
    from PIL import Image

    from distill.worlds.scenes.render import render

    file = BytesIO()
    Image.fromarray(render([scene])[0]).save(file, "PNG")
    return file.getvalue()
