"""The toy dataset as a source of prompts and of captioned images."""

from collections.abc import Iterator
from functools import partial
from io import BytesIO
from typing import Any

from distill.data.sources import Example

COUNT = 20_000  # prompts or images where no count is given


def scene_prompts(count: int | None, seed: int) -> list[str]:
    """Prompts that training may see."""
    from distill.worlds.scenes.captions import training_prompts

    return training_prompts(COUNT if count is None else count, seed)


def scene_images(count: int | None, seed: int) -> Iterator[Example]:
    """Captioned scenes; each is a function of the seed and its index alone, and is rendered when it is read."""
    import numpy as np

    from distill.worlds.scenes.captions import sample_prompt, wording
    from distill.worlds.scenes.render import place

    for index in range(COUNT if count is None else count):
        rng = np.random.default_rng((seed, index))
        prompt = sample_prompt(rng)
        caption, scene = wording(prompt, rng), place(prompt, rng)
        yield Example(f"scene {index} of seed {seed}", caption, 0, partial(_png, scene), bytes)


def _png(scene: Any) -> bytes:
    from PIL import Image

    from distill.worlds.scenes.render import render

    file = BytesIO()
    Image.fromarray(render([scene])[0]).save(file, "PNG")
    return file.getvalue()
