"""The autoscaling policy: how many replicas are needed. No Ray, no I/O, no clock."""

from collections.abc import Iterable
from typing import Any

BUSY = 0.8  # target utilization of a replica; the rest is room for bursts


def replicas_needed(busy: Iterable[float], queue_seconds: Iterable[float], target_queue_seconds: float) -> float:
    """Compute the replicas that carry the load, and those that would work off the queues in `target_queue_seconds`.

    `busy` is the utilization of each replica, `queue_seconds` the time that each one needs for its queue. Both sums do
    not depend on the number of replicas, so a change of that number does not cause another one.
    """
    return sum(busy) / BUSY + sum(queue_seconds) / target_queue_seconds


class ByQueueSeconds:
    """The policy as Ray Serve calls it, many times a second; Ray applies its delays and bounds to the answer."""

    def __init__(self, target_queue_seconds: float) -> None:
        self._target_queue_seconds = target_queue_seconds

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Return the number of replicas for the reported figures, or the current number if there are none yet.

        `context` is an `AutoscalingContext` of Ray Serve. The second value is the policy's state: none.
        """
        known = context.aggregated_metrics
        if not {"busy", "queue_seconds"} <= known.keys():
            return context.target_num_replicas, {}
        return replicas_needed(known["busy"].values(), known["queue_seconds"].values(), self._target_queue_seconds), {}
