"""How many replicas the work at hand needs. Pure policy: no Ray, no I/O, no clock."""

from collections.abc import Iterable
from typing import Any

BUSY = 0.8  # share of the time for which a replica should compute; the rest is room for bursts


def replicas_needed(busy: Iterable[float], queue_seconds: Iterable[float], target_queue_seconds: float) -> float:
    """Compute the replicas that carry the load, and those that would work off the queues in `target_queue_seconds`.

    `busy` is the share of the time for which each replica computes, `queue_seconds` the time in which each one would
    make what waits in it. Both add up to the same whatever the number of replicas that the work is spread over, so
    that a change of their number is no reason for the next one.
    """
    return sum(busy) / BUSY + sum(queue_seconds) / target_queue_seconds


class ByQueueSeconds:
    """The policy as Ray Serve calls it, many times a second; Ray applies its delays and bounds to the answer."""

    def __init__(self, target_queue_seconds: float) -> None:
        self._target_queue_seconds = target_queue_seconds

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Replicas wanted, from what `record_autoscaling_stats` told of each; as many as now while nothing is known.

        `context` is an `AutoscalingContext` of Ray Serve. The second value is state kept for the next call: none.
        """
        known = context.aggregated_metrics
        if not {"busy", "queue_seconds"} <= known.keys():
            return context.target_num_replicas, {}
        return replicas_needed(known["busy"].values(), known["queue_seconds"].values(), self._target_queue_seconds), {}
