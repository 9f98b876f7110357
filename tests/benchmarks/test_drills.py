"""Short forms of benchmarks/drills.py pass on a machine of any speed."""

import pytest

from benchmarks import drills


@pytest.mark.parametrize(
    "drill",
    [
        lambda: drills.overload(1.0, clients=96),
        lambda: drills.soak(1.0, clients=4, looks=8),
        lambda: drills.chaos(2, clients=4),
        lambda: drills.fleet(0.5, clients=8, devices=3),
    ],
    ids=["overload", "soak", "chaos", "fleet"],
)
def test_no_promise_is_broken(drill, capsys):
    found = drill()
    assert list(found.errors()) == []
    found.show()
    assert "nan" not in capsys.readouterr().out


def refusal(**changes) -> drills.Answer:
    headers = {"retry-after": "2", "retry-after-ms": "1500", "x-queue-position": "40"} | changes
    body = b'{"error": {"message": "full", "type": "rate_limit_error", "param": null, "code": "queue_full"}}'
    return drills.Answer(0.01, 429, headers, body)


def test_a_refusal_that_does_not_help_is_seen():
    assert drills.malformed(refusal()) is None
    for changes in ({"retry-after": "1"}, {"retry-after-ms": "soon"}, {"x-queue-position": "41"}):
        assert drills.malformed(refusal(**changes))
    assert drills.malformed(refusal()._replace(body=b'{"detail": "full"}'))


def test_memory_that_grows_is_seen():
    times = list(range(100))
    flat = drills.Soak(None, 100.0, times, [100.0 + (time < 40) for time in times], [1])
    assert flat.growth <= flat.bound
    leaking = drills.Soak(None, 100.0, times, [100.0 + 0.1 * time for time in times], [1])
    assert leaking.growth == pytest.approx(4.9)
    assert leaking.growth > leaking.bound
