"""Learning rates are a function of the images seen: they rise, hold and fall."""

import pytest

from distill.training.rate_schedule import RateSchedule


@pytest.mark.parametrize("batch", [4, 8])
@pytest.mark.parametrize(("shape", "final"), [("cosine", 0), ("linear", 0.02)])
def test_the_rate_rises_holds_and_falls_whatever_the_batch(batch, shape, final) -> None:
    schedule = RateSchedule(8000, batch, 1000, 4000, shape, final)
    first, risen, *plateau, middle, last = map(schedule.factor, (0, 992, 2000, 4000, 6000, 7992))
    assert first == batch / 1000
    assert risen == pytest.approx(1, abs=0.01)
    assert plateau == [1, 1]
    assert (middle, last) == (pytest.approx((1 + final) / 2), pytest.approx(final, abs=0.003))


def test_a_decay_that_is_longer_than_the_budget_takes_all_of_it() -> None:
    assert RateSchedule(1000, 8, 0, 4000).factor(500) == pytest.approx(0.5)
    assert RateSchedule(1000, 8, 0, 0).factor(992) == RateSchedule(1000, 8, 0, 0).factor(0) == 1
