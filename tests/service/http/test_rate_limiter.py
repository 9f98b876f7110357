"""Limits on the images of one caller."""

import time

import pytest
from running import generate, metric

from service.engine.simulator import Simulator
from service.errors import Overloaded, to_openai
from service.http.rate_limiter import RateLimiter
from service.observability.metrics import Metrics


def test_retry_after_is_the_time_until_so_many_images_fit(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    limiter = RateLimiter("10/10 seconds; 15/minute", Metrics())

    def wait(images: int) -> float:
        with pytest.raises(Overloaded) as refused:
            limiter.take("ann", images)
        headers = to_openai(refused.value)[2]
        assert int(headers["retry-after"]) >= 1
        assert "0.0 s" not in refused.value.message
        return refused.value.retry_after

    limiter.take("ann", 1)
    now += 4
    limiter.take("ann", 9)
    assert wait(1) == 6  # the first image leaves at 10 s, the nine at 14 s
    assert wait(2) == 10
    assert wait(8) == 60  # of the other rate, three have to leave
    now += wait(2) + 0.001
    limiter.take("ann", 2)
    limiter.take("bob", 10)
    now += 7.999
    assert wait(10) == pytest.approx(42)


def test_the_rate_limit_counts_images_and_sends_retry_after(serve):
    url = serve(Simulator(0, 0), http={"rate_limit": "5/hour"})
    assert generate(url, n=6).json()["error"]["param"] == "n"
    assert generate(url, n=4).status_code == 200
    refused = generate(url, n=2)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 3500 < int(refused.headers["retry-after"]) <= 3601
    assert generate(url, n=1).status_code == 200
    assert metric(url, "refusals_total", reason="rate_limit") == 1


def test_callers_behind_a_trusted_proxy_have_separate_limits(serve):
    url = serve(Simulator(0, 0), http={"rate_limit": "1/hour"})
    for client, status in (("203.0.113.7", 200), ("203.0.113.8", 200), ("203.0.113.7", 429)):
        assert generate(url, {"x-forwarded-for": client}).status_code == status
