"""The settings that the teacher of CIFAR-10 is trained with."""

from distill.worlds.recipe import Count, Period, Rate, TrainingRecipe


class Cifar10Recipe(TrainingRecipe):
    """How the teacher is trained: mirrored copies count as images, and a head has 64 channels.

    With `conditional` the captions are the names of the classes, otherwise the same word for all images.
    """

    images: Count = 51_200_000
    batch: Count = 128
    learning_rate: Rate = 2e-4
    warmup: Period = 38_400
    decay: Period = 20_480_000
    ema_half_life: Count = 887_000
    checkpoint_every: Count = 128_000
    conditional: bool = False
    layers: Count = 12
    heads: Count = 6
