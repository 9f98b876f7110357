"""`EtaEstimator`: when a run will have reached its budget."""

import time
from collections.abc import Callable


class EtaEstimator:
    """Estimates from the speed since this process began to watch the run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start: tuple[float, int] | None = None

    def finish(self, seen: int, total: int | None) -> int | None:
        """Return the time of the end in seconds since 1970, or None while it cannot be estimated."""
        if not seen or total is None:
            return None
        if self._start is None:
            self._start = self._clock(), seen
        seconds, images = self._clock() - self._start[0], seen - self._start[1]
        return int(time.time() + seconds * (total - seen) / images) if images > 0 else None
