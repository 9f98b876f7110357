"""Every way to ask for images and to be answered: links, streams, bytes, headers, retries."""

import base64
import io
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import fsspec
import httpx
import pytest
from PIL import Image
from running import metric, serving

from service.app import create_app
from service.engine.backend import Simulator
from service.engine.launch import worker_threads
from service.errors import Overloaded, StartError, to_openai
from service.http.rate_limiter import RateLimiter
from service.images.artifacts import Artifacts
from service.observability.metrics import Metrics
from service.settings import Settings


@pytest.fixture(scope="module")
def api():
    settings = Settings(aliases={"gpt-image-1": "simulator"}, cors_origins=("https://studio.example",))
    with serving(create_app(settings, worker_threads(Simulator(0, 0)))) as url:
        yield url


def ask(api, headers=None, **body):
    return httpx.post(f"{api}/v1/images/generations", json={"prompt": "a", **body}, headers=headers)


def param(answer):
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["param"]


def test_links_lead_to_the_images(api, connect):
    answer = connect(api).images.generate(prompt="a", n=2, response_format="url", extra_body={"seed": 4})
    assert [item.b64_json for item in answer.data] == [None, None]
    plain = connect(api).images.generate(prompt="a", n=2, extra_body={"seed": 4})
    for linked, item in zip(answer.data, plain.data, strict=True):
        got = httpx.get(linked.url)
        assert got.content == base64.b64decode(item.b64_json)
        assert got.headers["content-type"] == "image/png"


def test_a_link_with_another_signature_or_name_is_not_found(api):
    url = ask(api, response_format="url").json()["data"][0]["url"]
    for wrong in (
        url[:-1],
        url[:-4] + "0000",
        url.replace("artifacts/1", "artifacts/2"),
        url.split("?")[0] + "?signature=é",
    ):
        answer = httpx.get(wrong)
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")


@pytest.mark.parametrize("content", [b"", b"\n", b"half of it", bytes(32)])
def test_a_damaged_secret_signs_no_links(tmp_path, content):
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(StartError, match=r"secret, which signs links to images, is damaged"):
        create_app(Settings(data=tmp_path), worker_threads(Simulator()))
    assert (tmp_path / "secret").read_bytes() == content
    (tmp_path / "secret").unlink()
    create_app(Settings(data=tmp_path), worker_threads(Simulator()))
    assert len((tmp_path / "secret").read_bytes()) == 32


def test_artifacts_expire_and_are_swept(tmp_path):
    store = Artifacts(str(tmp_path), b"secret", 100)
    (tmp_path / "other.txt").write_text("not ours")
    old, new = (store.save(b"data", "png", now) for now in (1000.0, 1050.0))
    assert store.read(old, store.sign(old), 1099.0) == (b"data", "png")
    assert store.read(old, store.sign(old), 1100.0) is None
    assert store.read(old, store.sign(new), 1099.0) is None
    outside = "../other.txt"
    assert store.read(outside, store.sign(outside), 1000.0) is None
    assert store.sweep(1120.0) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [new, "other.txt"]
    same = Artifacts(f"file://{tmp_path}", b"secret", 100)  # another replica with the secret
    assert same.read(new, store.sign(new), 1120.0) == (b"data", "png")


def test_a_sweep_finds_nothing_where_an_object_store_shows_no_folder():
    store = Artifacts("memory://links", b"secret", 100)
    files = fsspec.filesystem("memory")
    files.rm("links", recursive=True)
    assert store.sweep(0) == 0
    store.save(b"one", "png", 1000)
    assert store.sweep(1100) == 1


def test_a_stream_is_one_completed_event(api, connect):
    body = {"seed": 3}
    events = list(connect(api).images.generate(prompt="a", stream=True, partial_images=2, extra_body=body))
    assert [event.type for event in events] == ["image_generation.completed"]
    (event,) = events
    assert (event.size, event.quality, event.background, event.output_format) == ("64x64", "auto", "opaque", "png")
    assert event.b64_json == ask(api, seed=3).json()["data"][0]["b64_json"]
    assert event.usage.total_tokens == 3 + 16
    assert event.created_at <= time.time()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_bytes_are_answered_to_who_accepts_them(api, kind):
    answer = ask(api, {"accept": f"image/{kind};q=0.9"}, seed=5)
    assert answer.headers["content-type"] == f"image/{kind}"
    assert answer.headers["x-seed"] == "5"
    assert Image.open(io.BytesIO(answer.content)).format == kind.upper()


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("application/json, image/png", "application/json"),
        ("image/webp;q=0.5, application/json", "application/json"),
        ("application/json;q=0.5, image/webp", "image/webp"),
        ("image/webp;q=0.5, image/jpeg;q=0.8, */*;q=0.1", "image/jpeg"),
        ("image/png;q=0, */*", "application/json"),
        ("IMAGE/PNG;q=x", "image/png"),
        ("text/html", "application/json"),
        ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", "application/json"),  # Java's HttpURLConnection
        ("text/html, application/xml;q=0.9, image/avif, image/webp, */*;q=0.8", "application/json"),  # browsers
        ("image/avif, image/webp, image/*, */*;q=0.8", "image/webp"),  # of an <img>
        ("*/*;q=0.9, image/png;q=.1", "application/json"),
        ("image/png;q=.9, */*;q=.1", "image/png"),
        ("image/png, application/json", "application/json"),
        ("image/webp, image/png", "image/webp"),
        ("image/*", "image/png"),
        ("image/png, garbage", "image/png"),
        ("image/gif", "application/json"),
        ("image/png" + 3000 * ";", "application/json"),
    ],
)
def test_clients_get_what_they_like_best(api, accept, kind):
    assert ask(api, {"accept": accept}).headers["content-type"] == kind


def test_of_several_kinds_of_image_the_format_of_the_request_is_taken(api):
    for accept in ("image/*", "image/png, image/webp;q=0.9", "image/png, image/webp"):
        assert ask(api, {"accept": accept}, output_format="webp").headers["content-type"] == "image/webp"


def test_accept_may_be_several_headers(api):
    headers = [("accept", "image/png;q=0.5"), ("accept", "application/json;q=0.1")]
    assert ask(api, headers).headers["content-type"] == "image/png"


def test_what_contradicts_itself_is_refused_by_name(api):
    raw = {"accept": "image/png"}
    assert param(ask(api, raw, n=2)) == "n"
    assert param(ask(api, raw, response_format="url")) == "response_format"
    assert param(ask(api, raw, output_format="webp")) == "output_format"
    assert param(ask(api, raw, stream=True)) == "stream"
    assert param(ask(api, stream=True, n=2)) == "n"
    assert param(ask(api, stream=True, response_format="url")) == "response_format"


def test_stages_are_timed_in_a_header(api):
    def stages(**body) -> list[str]:
        timed = dict(part.split(";dur=") for part in ask(api, **body).headers["server-timing"].split(", "))
        assert all(float(duration) >= 0 for duration in timed.values())
        return list(timed)

    every = ["queue", "text", "model", "vae", "encode"]
    assert stages(prompt="timed", seed=1) == every
    assert stages(prompt="timed", seed=1) == ["encode"]  # the result cache had it
    assert stages(prompt="timed", seed=1, n=2) == every


def test_a_retry_with_its_key_gets_the_same_answer_and_makes_nothing(api):
    before = metric(api, "images_total")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(api, {"idempotency-key": "k1"}), range(4)))
    assert len({answer.content for answer in answers}) == 1  # the seed was drawn once
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 3
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4
    assert metric(api, "images_total") == before + 1
    assert ask(api, {"idempotency-key": "k2"}).content != answers[0].content
    assert param(ask(api, {"idempotency-key": "k1"}, n=2)) == "Idempotency-Key"


def test_a_failure_is_not_remembered(serve):
    url = serve(Simulator(0, 0, fails_on="poison"))
    for _ in range(2):
        answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "poison"}, headers={"idempotency-key": "k"})
        assert answer.status_code == 500
        assert "idempotent-replayed" not in answer.headers


def test_remembered_answers_are_bounded(serve):
    url = serve(Simulator(0, 0), replay_bytes=1)
    bodies = {ask(url, {"idempotency-key": "k"}).content for _ in range(2)}
    assert len(bodies) == 2


def test_aliases_stand_for_a_model(api, connect):
    client = connect(api)
    assert [model.id for model in client.models.list()] == ["simulator", "gpt-image-1"]
    assert client.models.retrieve("gpt-image-1").id == "gpt-image-1"
    assert client.images.generate(prompt="a", model="gpt-image-1").data


def test_pages_of_other_origins_are_let_in_by_setting_alone(api, serve):
    asks = {
        "origin": "https://studio.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    allowed = httpx.options(f"{api}/v1/images/generations", headers=asks)
    assert allowed.headers["access-control-allow-origin"] == "https://studio.example"
    assert "x-stainless-lang" in allowed.headers["access-control-allow-headers"]
    other = httpx.options(f"{api}/v1/images/generations", headers=asks | {"origin": "https://other.example"})
    assert not {"access-control-allow-origin", "access-control-allow-headers"} & {*other.headers}
    closed = httpx.options(f"{serve()}/v1/images/generations", headers=asks)
    assert "access-control-allow-origin" not in closed.headers


def test_pages_of_other_origins_can_read_every_failure(serve):
    broken = Simulator(0, 0)
    broken.info = replace(broken.info, pixels_per_token=0)
    url = serve(broken, cors_origins=("https://studio.example",), max_body_bytes=100, rate_limit="1/hour")
    for status, body in ((500, {"prompt": "a"}), (400, {}), (413, {"prompt": "a" * 200}), (429, {"prompt": "a"})):
        failed = httpx.post(f"{url}/v1/images/generations", json=body, headers={"origin": "https://studio.example"})
        assert failed.status_code == status
        assert failed.headers["access-control-allow-origin"] == "https://studio.example"
        assert "x-request-id" in failed.headers["access-control-expose-headers"]


def test_links_are_https_behind_a_proxy_that_is_trusted(serve):
    headers = {"x-forwarded-proto": "https", "x-forwarded-for": "203.0.113.7"}
    for trusted, scheme in (
        (("127.0.0.0/8",), "https"),
        (("10.0.0.0/8", "*"), "https"),
        (("10.0.0.0/8",), "http"),
        ((), "http"),
    ):
        url = serve(Simulator(0, 0), trusted_proxies=trusted)
        link = ask(url, headers, response_format="url").json()["data"][0]["url"]
        assert link.startswith(f"{scheme}://127.0.0.1:")


def test_callers_are_told_apart_behind_a_proxy_that_is_trusted(serve):
    url = serve(Simulator(0, 0), rate_limit="1/hour")
    for client, status in (("203.0.113.7", 200), ("203.0.113.8", 200), ("203.0.113.7", 429)):
        assert ask(url, {"x-forwarded-for": client}).status_code == status


def test_a_refusal_by_rate_says_when_so_many_images_fit(monkeypatch):
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


@pytest.mark.parametrize("seconds", [0, -1, 1e-9])
def test_a_refusal_never_says_to_come_back_at_once(seconds):
    error = Overloaded("full", seconds, "queue_full")
    headers = to_openai(error)[2]
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("1", "100")
    assert error.message == "full; try again in 0.1 s"


def test_a_star_in_the_host_of_an_allowed_origin_stands_for_any_name(serve):
    url = serve(cors_origins=["chrome-extension://*", "https://*.example.com", "http://LOCALHOST:*"])
    inside = ["chrome-extension://abcdefghijklmnop", "https://a.b.example.com", "http://localhost:5173"]
    outside = ["https://example.com", "https://evilexample.com", "https://a.example.com.evil.com", "null"]
    outside += ["http://a.example.com", "https://a.example.com:444", "moz-extension://a", "https://evil@.example.com"]
    outside += ["http://localhost:5173.evil.com"]
    for origin in inside + outside:
        answer = ask(url, {"origin": origin})
        assert (answer.status_code == 200) == (origin in inside), origin
        assert (answer.headers.get("access-control-allow-origin") == origin) == (origin in inside), origin


@pytest.fixture(scope="module")
def warning():
    with serving(create_app(Settings(unsupported="warn"), worker_threads(Simulator(0, 0)))) as url:
        yield url


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("quality", value) for value in ("medium", "hd", 1, [])],
        *[("style", value) for value in ("vivid", {})],
        *[("background", value) for value in ("transparent", False)],
        *[("moderation", value) for value in ("none", 0)],
        *[("output_compression", value) for value in (50, 101, "90")],
        *[("partial_images", value) for value in (2, 9)],
        *[("user", value) for value in (7, "x" * 257)],
        *[("size", value) for value in ("1024x1024", "wide", "1024 x 1024", 1024, "")],
        *[(name, {"seed": 7}) for name in ("extra_body", "negative_prompt", "steps", "input_fidelity", "__proto__")],
        ("seed", -1),
    ],
)
def test_an_unsupported_field_is_ignored_and_named_where_the_server_warns(warning, api, field, value):
    answer = ask(warning, **{field: value})
    assert answer.status_code == 200, answer.text
    (said,) = answer.json()["warnings"]
    assert field in said
    assert answer.json()["size"] == "64x64"
    assert param(ask(api, **{field: value})) == field


def test_all_that_is_not_done_as_requested_is_named_in_every_form_of_answer(warning):
    unsupported = {"quality": "high", "style": "vivid", "size": "1792x1024", "seed": -1, "a\r\nb: ü": 1}
    answer = ask(warning, n=2, output_format="webp", user="ann", **unsupported).json()
    assert (len(answer["data"]), answer["output_format"]) == (2, "webp")
    assert (answer["size"], len(answer["warnings"])) == ("128x64", len(unsupported))  # of the two sizes, the wide one
    assert ask(warning, **unsupported).json()["data"][0]["seed"] != answer["data"][0]["seed"]
    streamed = ask(warning, stream=True, **unsupported).text
    assert all(name in streamed for name in ("quality is ignored", "style is ignored", "size is 128x64"))
    raw = ask(warning, {"accept": "image/png"}, **unsupported)
    assert "quality is ignored" in raw.headers["x-warning"]
    assert "a\\r\\nb: \\xfc is ignored" in raw.headers["x-warning"]
    assert "b" not in raw.headers
    many = ask(warning, **{f"field-{number}" * 99: 1 for number in range(1000)}).json()["warnings"]
    assert many[-1] == "984 more fields are ignored"
    assert sum(map(len, many)) < 2000
    assert "warnings" not in ask(warning, quality="auto", background="opaque", seed=7).json()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 7),
        ("n", 11),
        ("seed", -2),
        ("seed", "7"),
        ("output_format", "gif"),
        ("response_format", "png"),
        ("stream", "yes"),
        ("timeout", 0),
        ("lora", {"name": "style", "path": "x"}),
    ],
)
def test_what_changes_the_images_or_the_answer_is_refused_even_where_the_server_warns(warning, field, value):
    assert param(ask(warning, quality="hd", **{field: value})).startswith(field)


def test_the_message_for_a_wrong_field_says_what_to_do(api):
    def message(**body) -> str:
        return ask(api, **body).json()["error"]["message"]

    assert "leave seed out for a random one" in message(seed=-1)
    assert "leave seed out for a random one" in message(seed=2**53 - 1, n=2)
    assert "take one of these, or leave size out" in message(size="1024x1024")
    assert "give auto or WIDTHxHEIGHT, or leave size out" in message(size="1024*1024")
    assert "put the fields in it at the top level" in message(extra_body={"seed": 7})
    assert "leave it out" in message(quality="medium")
    assert "leave it out" in message(negative_prompt="b")


def test_the_rate_limit_counts_images_and_says_when_to_come_back(serve):
    url = serve(Simulator(0, 0), rate_limit="5/hour")
    assert param(ask(url, n=6)) == "n"
    assert ask(url, n=4).status_code == 200
    refused = ask(url, n=2)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 3500 < int(refused.headers["retry-after"]) <= 3601
    assert ask(url, n=1).status_code == 200
    assert metric(url, "refusals_total", reason="rate_limit") == 1


def test_the_playground_holds_all_it_needs(api):
    for name in ("", "jobs", "batches"):
        page = httpx.get(f"{api}/{name}")
        assert page.headers["content-type"].startswith("text/html")
        assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
        assert "<script>" not in page.text  # the policy would refuse it
        for part in re.findall(r'(?:src|href)="(web/[^"]+)"', page.text):
            found = httpx.get(f"{api}/{part}")
            assert found.status_code == 200
            assert not re.search(r"https?://(?!www\.w3\.org)", page.text + found.text)
    assert httpx.get(f"{api}/web/../settings.py").status_code == 404
    assert httpx.get(f"{api}/web/none.js").status_code == 404
