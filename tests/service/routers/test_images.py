"""`POST /v1/images/generations`: fields, formats of the answer, headers."""

import base64
import io
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest
from PIL import Image
from running import generate, serving
from worker_threads import worker_threads

from service.app import create_app
from service.engine.simulator import Simulator
from service.settings import Settings

ANY_STEP = replace(Simulator().info, max_steps=4, decoder="small", decoder_digest="5ma11")


@pytest.fixture(scope="module")
def api():
    with serving(create_app(Settings(), worker_threads(Simulator(0, 0)))) as url:
        yield url


def param(answer):
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["param"]


def test_links_return_the_images(api, connect):
    answer = connect(api).images.generate(prompt="a", n=2, response_format="url", extra_body={"seed": 4})
    assert [item.b64_json for item in answer.data] == [None, None]
    plain = connect(api).images.generate(prompt="a", n=2, extra_body={"seed": 4})
    for linked, item in zip(answer.data, plain.data, strict=True):
        got = httpx.get(linked.url)
        assert got.content == base64.b64decode(item.b64_json)
        assert got.headers["content-type"] == "image/png"


def test_a_link_with_a_wrong_signature_or_name_is_not_found(api):
    url = generate(api, response_format="url").json()["data"][0]["url"]
    for wrong in (
        url[:-1],
        url[:-4] + "0000",
        url.replace("artifacts/1", "artifacts/2"),
        url.split("?")[0] + "?signature=é",
    ):
        answer = httpx.get(wrong)
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")


def test_a_stream_is_one_completed_event(api, connect):
    body = {"seed": 3}
    events = list(connect(api).images.generate(prompt="a", stream=True, partial_images=2, extra_body=body))
    assert [event.type for event in events] == ["image_generation.completed"]
    (event,) = events
    assert (event.size, event.quality, event.background, event.output_format) == ("64x64", "auto", "opaque", "png")
    assert event.b64_json == generate(api, seed=3).json()["data"][0]["b64_json"]
    assert event.usage.total_tokens == 3 + 16
    assert event.created_at <= time.time()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_clients_that_accept_images_get_the_bytes(api, kind):
    answer = generate(api, {"accept": f"image/{kind};q=0.9"}, seed=5)
    assert answer.headers["content-type"] == f"image/{kind}"
    assert answer.headers["x-seed"] == "5"
    assert Image.open(io.BytesIO(answer.content)).format == kind.upper()


def test_several_accept_headers_are_combined(api):
    headers = [("accept", "image/png;q=0.5"), ("accept", "application/json;q=0.1")]
    assert generate(api, headers).headers["content-type"] == "image/png"


def test_contradicting_fields_are_refused_by_name(api):
    raw = {"accept": "image/png"}
    assert param(generate(api, raw, n=2)) == "n"
    assert param(generate(api, raw, response_format="url")) == "response_format"
    assert param(generate(api, raw, output_format="webp")) == "output_format"
    assert param(generate(api, raw, stream=True)) == "stream"
    assert param(generate(api, stream=True, n=2)) == "n"
    assert param(generate(api, stream=True, response_format="url")) == "response_format"


@pytest.fixture(scope="module")
def any_step():
    with serving(create_app(Settings(), worker_threads(Simulator(0, 0, info=ANY_STEP)))) as url:
        yield url


def test_an_any_step_model_takes_steps(any_step, connect):
    client = connect(any_step)
    model = client.models.retrieve("simulator")
    assert (model.max_steps, model.decoder) == (4, "small")
    one = client.images.generate(prompt="a", extra_body={"seed": 7})
    for steps in (None, 1):
        again = client.images.generate(prompt="a", extra_body={"seed": 7, "steps": steps})
        assert again.data[0].b64_json == one.data[0].b64_json
    assert one.decoder == "small"
    several = client.images.generate(prompt="a", extra_body={"seed": 7, "steps": 3})
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(several.data[0].b64_json))))
    assert np.array_equal(pixels[0, 0], np.random.default_rng(7 + 2 * 10**6).integers(0, 256, 3, dtype=np.uint8))
    raw = generate(any_step, {"accept": "image/png"}, seed=7, steps=3)
    description = Image.open(io.BytesIO(raw.content)).info["Description"]
    assert description == "model simulator in 3 steps, seed 7, small decoder"


def test_steps_that_the_model_does_not_support_are_refused_by_name(api, any_step):
    for url, steps, reason in ((api, 2, "one step"), (any_step, 5, "1 to 4 steps"), (any_step, 0, "1"), (api, 1.5, "")):
        answer = generate(url, steps=steps)
        assert param(answer) == "steps"
        assert reason in answer.json()["error"]["message"]


def test_a_header_has_the_time_of_each_stage(api):
    def stages(**body) -> list[str]:
        timed = dict(part.split(";dur=") for part in generate(api, **body).headers["server-timing"].split(", "))
        assert all(float(duration) >= 0 for duration in timed.values())
        return list(timed)

    every = ["queue", "text", "model", "vae", "encode"]
    assert stages(prompt="timed", seed=1) == every
    assert stages(prompt="timed", seed=1) == ["encode"]  # the result cache had it
    assert stages(prompt="timed", seed=1, n=2) == every


def test_links_are_https_behind_a_trusted_proxy(serve):
    headers = {"x-forwarded-proto": "https", "x-forwarded-for": "203.0.113.7"}
    for trusted, scheme in (
        (("127.0.0.0/8",), "https"),
        (("10.0.0.0/8", "*"), "https"),
        (("10.0.0.0/8",), "http"),
        ((), "http"),
    ):
        url = serve(Simulator(0, 0), http={"trusted_proxies": trusted})
        link = generate(url, headers, response_format="url").json()["data"][0]["url"]
        assert link.startswith(f"{scheme}://127.0.0.1:")


@pytest.mark.parametrize("value", ["HTTPS", "Https, http", "https,https"])
def test_the_scheme_of_a_proxy_may_have_capitals_and_others_behind_it(value, serve):
    url = serve(Simulator(0, 0))
    link = generate(url, {"x-forwarded-proto": value}, response_format="url").json()["data"][0]["url"]
    assert link.startswith("https://")


@pytest.fixture(scope="module")
def warning():
    with serving(create_app(Settings(images={"unsupported_fields": "warn"}), worker_threads(Simulator(0, 0)))) as url:
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
        *[("steps", value) for value in (30, 0, "4")],
        *[(name, {"seed": 7}) for name in ("extra_body", "negative_prompt", "steps", "input_fidelity", "__proto__")],
        ("seed", -1),
    ],
)
def test_with_warnings_an_unsupported_field_is_ignored_and_named(warning, api, field, value):
    answer = generate(warning, **{field: value})
    assert answer.status_code == 200, answer.text
    (said,) = answer.json()["warnings"]
    assert field in said
    assert answer.json()["size"] == "64x64"
    assert param(generate(api, **{field: value})) == field


def test_every_response_format_names_all_ignored_fields(warning):
    unsupported = {"quality": "high", "style": "vivid", "size": "1792x1024", "seed": -1, "a\r\nb: ü": 1}
    answer = generate(warning, n=2, output_format="webp", user="ann", **unsupported).json()
    assert (len(answer["data"]), answer["output_format"]) == (2, "webp")
    assert (answer["size"], len(answer["warnings"])) == ("128x64", len(unsupported))  # of the two sizes, the wide one
    assert generate(warning, **unsupported).json()["data"][0]["seed"] != answer["data"][0]["seed"]
    streamed = generate(warning, stream=True, **unsupported).text
    assert all(name in streamed for name in ("quality is ignored", "style is ignored", "size is 128x64"))
    raw = generate(warning, {"accept": "image/png"}, **unsupported)
    assert "quality is ignored" in raw.headers["x-warning"]
    assert "a\\r\\nb: \\xfc is ignored" in raw.headers["x-warning"]
    assert "b" not in raw.headers
    many = generate(warning, **{f"field-{number}" * 99: 1 for number in range(1000)}).json()["warnings"]
    assert many[-1] == "984 more fields are ignored"
    assert sum(map(len, many)) < 2000
    assert "warnings" not in generate(warning, quality="auto", background="opaque", seed=7).json()


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
def test_with_warnings_fields_that_change_the_images_or_the_response_are_still_refused(warning, field, value):
    assert param(generate(warning, quality="hd", **{field: value})).startswith(field)


def test_the_error_of_an_invalid_field_names_the_fix(api):
    def message(**body) -> str:
        return generate(api, **body).json()["error"]["message"]

    assert "leave seed out for a random one" in message(seed=-1)
    assert "leave seed out for a random one" in message(seed=2**53 - 1, n=2)
    assert "take one of these, or leave size out" in message(size="1024x1024")
    assert "give auto or WIDTHxHEIGHT, or leave size out" in message(size="1024*1024")
    assert "put the fields in it at the top level" in message(extra_body={"seed": 7})
    assert "leave it out" in message(quality="medium")
    assert "leave it out" in message(negative_prompt="b")
