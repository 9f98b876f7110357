"""Requests that are repeated with an `Idempotency-Key`."""

from concurrent.futures import ThreadPoolExecutor

from running import generate, metric

from service.engine.simulator import Simulator


def test_a_repeated_key_gets_the_stored_response(serve):
    api = serve(Simulator(0, 0))
    before = metric(api, "images_total")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: generate(api, {"idempotency-key": "k1"}), range(4)))
    assert len({answer.content for answer in answers}) == 1  # the seed was drawn once
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 3
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4
    assert metric(api, "images_total") == before + 1
    assert generate(api, {"idempotency-key": "k2"}).content != answers[0].content
    assert generate(api, {"idempotency-key": "k1"}, n=2).json()["error"]["param"] == "Idempotency-Key"


def test_an_error_is_not_stored(serve):
    url = serve(Simulator(0, 0, fails_on="poison"))
    for _ in range(2):
        answer = generate(url, {"idempotency-key": "k"}, prompt="poison")
        assert answer.status_code == 500
        assert "idempotent-replayed" not in answer.headers


def test_stored_responses_are_limited_in_size(serve):
    url = serve(Simulator(0, 0), http={"idempotency_cache_bytes": 1})
    bodies = {generate(url, {"idempotency-key": "k"}).content for _ in range(2)}
    assert len(bodies) == 2
