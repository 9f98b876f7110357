"""The exponential moving average of a training's weights, with its half-life in images.

The batch size and the number of devices change nothing of it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

RAMP = 0.1  # of the images seen: the longest half-life


def new_share(half_life: float, images: int, batch: int) -> float:
    """Share in [0, 1] of the new weights in the average, after a step of `batch` images that ends at `images`.

    The half-life, in images, is at most a part of the images seen, so that the average does not stay at the weights
    that training started from (Karras et al., arXiv 2206.00364, code). A half-life of 0 is no average.
    """
    half_life = min(half_life, RAMP * images)
    return 1 - 0.5 ** (batch / half_life) if half_life else 1.0


@torch.no_grad()
def average_into(average: Iterable[Tensor], weights: Iterable[Tensor], share: Tensor | float) -> None:
    """Move each averaged tensor towards its new weights, in place, by `share`: a number, or a tensor () beside them."""
    for old, new in zip(average, weights, strict=True):
        old.lerp_(new, share)
