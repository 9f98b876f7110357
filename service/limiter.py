"""How many images a caller may ask for in a time."""

import math
import time

from limits import parse_many
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from service.errors import InvalidRequest, Overloaded
from service.metrics import Metrics


class Limiter:
    """Moving windows by caller, in the server's memory."""

    def __init__(self, rates: str | None, metrics: Metrics) -> None:
        """`rates` as the `limits` library writes them: `100/minute` or `10/second; 1000/day`."""
        self._rates = parse_many(rates) if rates else []
        self._windows = MovingWindowRateLimiter(MemoryStorage())
        self._metrics = metrics

    def take(self, owner: str, images: int) -> None:
        """Count images; raises Overloaded when they are too many for now, InvalidRequest when they always will be."""
        for rate in self._rates:
            if images > rate.amount:
                raise InvalidRequest(f"n is over your limit of {rate}", "n", "rate_limit_exceeded")
        for rate in self._rates:
            if not self._windows.test(rate, owner, cost=images):
                self._metrics.refusals.labels("rate_limit").inc()
                wait = max(1, math.ceil(self._windows.get_window_stats(rate, owner).reset_time - time.time()))
                raise Overloaded(f"over your limit of {rate}; try again in {wait} s", wait, "rate_limit_exceeded")
        for rate in self._rates:
            self._windows.hit(rate, owner, cost=images)
