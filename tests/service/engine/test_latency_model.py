"""Estimates of how long images take."""

from dataclasses import replace

import pytest

from service.engine.backend import BatchLimits, Timing
from service.engine.batcher import BatchKey
from service.engine.latency_model import NEWEST_WEIGHT, LatencyModel
from service.engine.simulator import Simulator


def test_estimates_start_at_what_was_timed_and_follow_what_batches_take():
    model, key = LatencyModel(), BatchKey("simulator", 64, 64)
    timing = Timing("simulator", 64, 64, 2, {"text": 0.5, "model": 1.0, "vae": 0.5}, 0)
    model.add(Simulator().info, {key: [timing]})
    adapted, four_steps = key._replace(adapter="ink", scale=1.0), key._replace(steps=4)
    assert model.seconds({key: 3, adapted: 1}) == pytest.approx(4)
    assert model.seconds({four_steps: 2}) == pytest.approx(5)  # three more model stages
    model.learn(four_steps, 1, 4.5)
    assert model.seconds({four_steps: 1}) == pytest.approx(2.5 + NEWEST_WEIGHT * (4.5 - 2.5))
    assert model.seconds({key: 1}) == pytest.approx(1)


def test_estimates_of_a_queue_do_not_follow_small_batches():
    model, key = LatencyModel(), BatchKey("simulator", 64, 64)
    info = replace(Simulator().info, batches=(BatchLimits((2, 8), 8),) * 2)
    model.add(info, {key: [Timing("simulator", 64, 64, 8, {"text": 0.0, "model": 8.0, "vae": 0.0}, 0)]})
    model.learn(key, 1, 6.0)
    assert model.seconds({key: 9}) == pytest.approx(10)  # the last one takes a batch of 2
    model.learn(key, 7, 16.0)
    assert model.seconds({key: 8}) == pytest.approx(8 * (1 + NEWEST_WEIGHT))
