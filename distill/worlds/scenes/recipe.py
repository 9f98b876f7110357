"""The settings that the teacher of the toy dataset is trained with."""

import math
import os
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from distill.worlds.recipe import Count, Period, Positive, Rate, TrainingRecipe
from distill.worlds.scenes.captions import TASKS, Task

_FRESH = {"vae_images": 26_000, "coarse_images": 660_000}  # defaults of a training from random weights


class ScenesRecipe(TrainingRecipe):
    """How the transformer and its text encoders are trained, and on which data.

    The first `coarse_images` of `images` are on large patches. `start` is the teacher folder whose weights training
    starts from, always on small patches; with `vae_images` None its autoencoder is used too. `task_weights` are the
    shares of the tasks in the scenes, scaled to sum 1; tasks that are not named get 0. Each evaluation, and the choice
    of the guidance scale, samples `per_task` prompts of each task.
    """

    images: Count = 1_600_000
    batch: Count = 64
    learning_rate: Rate = 1e-3
    warmup: Period = 19_200
    decay: Period = 400_000
    ema_half_life: Count = 44_000
    checkpoint_every: Count = 64_000
    time_mean: float = 0.4
    time_std: Positive = 1.2
    start: Annotated[str, AfterValidator(os.path.expanduser)] | None = None
    vae_images: Count | None = None
    coarse_images: Period = 0
    scenes: Count = 40_960
    task_weights: dict[Task, Annotated[float, Field(ge=0)]] = dict.fromkeys(TASKS, 1 / len(TASKS))
    per_task: Count = 32
    evaluate_every: Count = 64_000

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("start") is None:
            return _FRESH | {name: value for name, value in values.items() if value is not None}
        return values

    @field_validator("task_weights")
    @classmethod
    def _scale(cls, weights: dict[Task, float]) -> dict[Task, float]:
        total = math.fsum(weights.values())
        if total == 0:
            raise ValueError("all are 0; give at least one task a positive number")
        return {task: weights.get(task, 0.0) / total for task in TASKS}

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if self.start is not None and self.coarse_images:
            raise ValueError("training with start has no large patches; leave out coarse_images")
        if self.coarse_images >= self.images:
            raise ValueError(f"images are not more than the {self.coarse_images} on large patches; set coarse_images")
        return self
