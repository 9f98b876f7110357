"""The settings that a small decoder is trained with."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from distill.config import Seed
from distill.config_group import ConfigGroup

SCALES = 3  # of the absolute error
_Count = Annotated[int, Field(ge=1, lt=2**63)]
_Weight = Annotated[float, Field(ge=0)]


class LossWeights(ConfigGroup):
    """Weights of the losses; their functions are in `losses.py`. `squared` is that of the mean squared error."""

    l1: _Weight = 3.0
    squared: _Weight = 1.0
    gradient: _Weight = 2.0
    feature: _Weight = 0.1

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("all weights are 0; give at least one a positive number")
        return self


class DecoderRecipe(ConfigGroup):
    """How a small decoder is trained. Budgets, warm-up, half-life and intervals are counted in images.

    An image of training is a square part of `crop` pixels of one of `latents` images, which the model makes of prompts.
    `width` is the number of channels, and `blocks` that of residual blocks at each resolution, from the latents' to
    the image's. None is half of the VAE's narrowest width, at least 16; and 3 blocks at each resolution, at the last 1.
    The feature distance costs more than all other losses, so it is computed on a `feature_share` of each batch only.
    The learning rate rises over `warmup` and falls to 0 by a cosine over the whole budget.
    """

    images: _Count = 200_000
    batch: _Count = 16
    seed: Seed = 0
    latents: _Count = 4096
    crop: Annotated[int, Field(ge=16)] = 256
    width: Annotated[int, Field(ge=4, le=1024)] | None = None
    blocks: tuple[Annotated[int, Field(ge=0, le=64)], ...] | None = None
    weights: LossWeights = LossWeights()
    feature_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-3
    warmup: Annotated[int, Field(ge=0)] = 1_600
    ema_half_life: Annotated[int, Field(ge=0)] = 4_000
    per_task: _Count = 128
    evaluation_images: _Count = 64
    log_every: _Count = 800
    evaluate_every: _Count = 20_000
    checkpoint_every: _Count = 8_000


class DecoderConfig(DecoderRecipe):
    """A recipe with all that a training was started with, as its folder records it.

    `teacher` is the model whose VAE is distilled, a student or a teacher, of digest `model_digest`. `teacher_steps` and
    `guidance` are how a teacher is sampled for latents; a student takes one step. `prompts` and `real` name sources.
    """

    kind: str = "decoder"
    teacher: str
    model_digest: str
    teacher_steps: int
    guidance: float
    prompts: str
    real: str | None = None
