"""The desired number of replicas, computed from their metrics."""

import pytest

from service.ray.autoscaling import replicas_needed


def test_an_idle_server_needs_none():
    assert replicas_needed([0, 0, 0], [0, 0, 0], target_queue_seconds=2) == 0


def test_replicas_that_always_compute_are_too_few():
    assert replicas_needed([1, 1], [0, 0], target_queue_seconds=2) > 2


def test_what_waits_needs_as_many_as_make_it_in_time():
    assert replicas_needed([0, 0], [3, 5], target_queue_seconds=2) == 4
    assert replicas_needed([0, 0], [3, 5], target_queue_seconds=4) == 2


@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_the_same_work_needs_the_same_however_many_replicas_share_it(replicas):
    spread = replicas_needed([1.8 / replicas] * replicas, [2.4 / replicas] * replicas, target_queue_seconds=2)
    assert spread == pytest.approx(replicas_needed([0.9, 0.9], [2.4, 0], target_queue_seconds=2))
