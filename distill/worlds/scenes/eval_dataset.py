"""The toy dataset for evaluation: its prompts, the verdicts of its scorer, and rendered scenes as real images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.evaluate.base import EvalPrompts, Images
from distill.worlds.scenes.captions import TASKS, Prompt, evaluation_prompts, wording
from distill.worlds.scenes.render import SIZE, place, render
from distill.worlds.scenes.score import verdicts


@dataclass(frozen=True)
class ScenePrompts(EvalPrompts):
    """Prompts of the toy dataset, each in one wording."""

    prompts: tuple[Prompt, ...]

    def scores(self, images: Images) -> dict[str, NDArray[np.float64]]:
        """GenEval's verdicts, by task."""
        return verdicts(self.prompts, images)

    def real(self, seed: int) -> Images:
        """A rendered scene for each prompt."""
        rng = np.random.default_rng((seed, 2))
        return render([place(prompt, rng) for prompt in self.prompts])


class ScenesEvalDataset:
    """The toy dataset with its scorer."""

    size = (SIZE, SIZE)

    def prompts(self, per_task: int, seed: int, held_out: bool = True) -> ScenePrompts:
        """Draw `per_task` prompts of each task from one split; an eighth of them is repeated, at least one a task."""
        rng = np.random.default_rng((seed, 1))
        prompts = tuple(evaluation_prompts(per_task, seed, held_out))
        texts = tuple(wording(prompt, rng) for prompt in prompts)
        few = max(1, per_task // 8)
        repeated = tuple(texts[k * per_task + i] for k in range(len(TASKS)) for i in range(few))
        return ScenePrompts(texts, tuple(prompt.task for prompt in prompts), repeated, prompts)
