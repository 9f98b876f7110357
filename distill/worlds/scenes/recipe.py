"""The settings that the teacher of the toy dataset is trained with."""

from dataclasses import dataclass

from distill.worlds.denoiser import TrainingRecipe


@dataclass(frozen=True, kw_only=True)
class ScenesRecipe(TrainingRecipe):
    """How the transformer and its text encoders are trained, and on which data.

    The first `coarse_images` of `images` are on large patches. `start` is the teacher folder whose weights training
    starts from; with `vae_images` None its autoencoder is copied too. `task_weights` are the shares of the tasks in the
    scenes. Each evaluation, and the choice of the guidance scale, samples `per_task` prompts of each task.
    """

    start: str | None
    vae_images: int | None
    coarse_images: int
    scenes: int
    task_weights: dict[str, float]
    per_task: int
    evaluate_every: int
    time_mean: float = 0.4
    time_std: float = 1.2
