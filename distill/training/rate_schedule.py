"""The learning rate of a training as a function of the images seen, so that the batch size changes nothing of it."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RateSchedule:
    """A linear warm-up, a plateau and a decay, as shares of the peak learning rate; all periods are in images.

    The rate decays over the last `decay` images of the `budget`, at most over all, to `final`: by half a cosine, or
    linearly.
    """

    budget: int
    batch: int
    warmup: int
    decay: int
    shape: Literal["cosine", "linear"] = "cosine"
    final: float = 0.0

    def factor(self, images: int) -> float:
        """The share in [0, 1] of the peak for the step after so many images."""
        warm = min(1.0, (images + self.batch) / max(self.warmup, 1))
        start = max(0, self.budget - self.decay)
        if images <= start:
            return warm
        seen, period = images - start, self.budget - start
        left = 0.5 + 0.5 * math.cos(math.pi * seen / period) if self.shape == "cosine" else (period - seen) / period
        return warm * (self.final + (1 - self.final) * left)
