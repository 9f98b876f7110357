"""The estimate of a run's end."""

import time

from service.jobs.fine_tuning.eta import EtaEstimator


def test_the_end_is_estimated_from_the_speed_since_this_start():
    now = 100.0
    eta = EtaEstimator(lambda: now)
    assert eta.finish(0, 64) is None
    assert eta.finish(16, 64) is None
    now = 110.0
    before = int(time.time())
    finish = eta.finish(32, 64)
    assert finish is not None
    assert before + 20 <= finish <= time.time() + 20
