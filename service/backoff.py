"""`backoff`: the pauses between attempts at what others must repair, such as a database or a device."""

import random
from collections.abc import Iterator


def backoff(first: float, longest: float, jitter: float = 0.0) -> Iterator[float]:
    """Yield seconds without end, twice as many each time, up to `longest`.

    `jitter` varies each pause by that share of it, so that many callers do not try again at the same time.
    """
    pause = first
    while True:
        yield pause * random.uniform(1 - jitter, 1 + jitter)
        pause = min(2 * pause, longest)
