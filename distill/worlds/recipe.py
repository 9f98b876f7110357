"""The settings of a small teacher's training."""

from typing import Annotated

from pydantic import Field

from distill.config_group import ConfigGroup

Count = Annotated[int, Field(ge=1)]


class TrainingRecipe(ConfigGroup):
    """How a teacher is trained. Warm-up, decay, half-life and intervals are counted in images."""

    images: Count
    batch: Count
    learning_rate: Annotated[float, Field(ge=0, le=1)]
    warmup: Annotated[int, Field(ge=0)]
    decay: Annotated[int, Field(ge=0)]
    ema_half_life: Count
    checkpoint_every: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    caption_dropout: float = 0.1
    time_mean: float = 0.0
    time_std: float = 1.0
