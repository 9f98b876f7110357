"""Pauses between attempts."""

from itertools import islice

from service.backoff import backoff


def test_pauses_are_doubled_up_to_the_longest_one():
    assert list(islice(backoff(1.0, 5.0), 5)) == [1, 2, 4, 5, 5]


def test_jitter_varies_each_pause_by_its_share_and_does_not_add_up():
    for _ in range(20):
        for pause, expected in zip(backoff(1.0, 64.0, jitter=0.5), [1, 2, 4, 8, 16, 32, 64, 64], strict=False):
            assert 0.5 * expected <= pause <= 1.5 * expected
