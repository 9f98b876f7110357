"""Rate limits: images per caller and time window."""

import time

from limits import RateLimitItem, parse_many
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from service.errors import InvalidRequest, Overloaded
from service.observability.metrics import Metrics


class RateLimiter:
    """Moving windows for each caller, in the server's memory."""

    def __init__(self, rates: str | None, metrics: Metrics) -> None:
        """`rates` as the `limits` library writes them: `100/minute` or `10/second; 1000/day`."""
        self._rates = parse_many(rates) if rates else []
        self._storage = MemoryStorage()
        self._windows = MovingWindowRateLimiter(self._storage)
        self._metrics = metrics

    def take(self, owner: str, images: int) -> None:
        """Count images. Raises Overloaded if they exceed a rate now, InvalidRequest if they always will."""
        for rate in self._rates:
            if images > rate.amount:
                raise InvalidRequest(f"n is over your limit of {rate}", "n", "rate_limit_exceeded")
        full = [rate for rate in self._rates if not self._windows.test(rate, owner, cost=images)]
        if full:
            self._metrics.refusals.labels("rate_limit").inc()
            waits = {rate: self._wait(rate, owner, images) for rate in full}
            rate = max(waits, key=waits.__getitem__)
            raise Overloaded(f"over your limit of {rate}", waits[rate], "rate_limit_exceeded")
        for rate in self._rates:
            self._windows.hit(rate, owner, cost=images)

    def _wait(self, rate: RateLimitItem, owner: str, images: int) -> float:
        """Return the seconds until enough earlier images have left the window for `images` more to fit."""
        newest_first = self._storage.events.get(rate.key_for(owner), [])
        last_to_leave = newest_first[rate.amount - images : rate.amount - images + 1]  # none if it has just left
        return max((image.atime + rate.get_expiry() - time.time() for image in last_to_leave), default=0.0)
