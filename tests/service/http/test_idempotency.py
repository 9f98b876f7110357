"""Requests that are repeated with an `Idempotency-Key`."""

from concurrent.futures import ThreadPoolExecutor

from running import generate, metric

from service.engine.backend import Simulator


def test_a_retry_with_its_key_gets_the_same_answer_and_makes_nothing(serve):
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


def test_a_failure_is_not_remembered(serve):
    url = serve(Simulator(0, 0, fails_on="poison"))
    for _ in range(2):
        answer = generate(url, {"idempotency-key": "k"}, prompt="poison")
        assert answer.status_code == 500
        assert "idempotent-replayed" not in answer.headers


def test_remembered_answers_are_bounded(serve):
    url = serve(Simulator(0, 0), http={"idempotency_cache_bytes": 1})
    bodies = {generate(url, {"idempotency-key": "k"}).content for _ in range(2)}
    assert len(bodies) == 2
