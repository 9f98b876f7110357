"""The settings of a small teacher's training."""

from typing import Annotated

from pydantic import Field

from distill.config_group import ConfigGroup

Count = Annotated[int, Field(ge=1)]
Period = Annotated[int, Field(ge=0)]  # images
Rate = Annotated[float, Field(ge=0, le=1)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class TrainingRecipe(ConfigGroup):
    """How a teacher is trained. Warm-up, decay, half-life and intervals are counted in images."""

    images: Count
    batch: Count
    learning_rate: Rate
    warmup: Period
    decay: Period
    ema_half_life: Count
    checkpoint_every: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    betas: tuple[_Decay, _Decay] = (0.9, 0.98)
    weight_decay: Rate = 0.01
    clip: Positive = 1.0
    caption_dropout: Rate = 0.1
    time_mean: float = 0.0
    time_std: Positive = 1.0
