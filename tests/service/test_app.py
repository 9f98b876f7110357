"""The whole app with the real OpenAI client: images, models, limits, errors."""

import asyncio
import base64
import io
import math
import re
import runpy
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from engines import Gate
from PIL import Image
from running import metric, serving, until
from worker_threads import worker_threads

from service.app import create_app
from service.engine.simulator import Simulator
from service.settings import Settings


def picture(answer, i=0) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer.data[i].b64_json)))


def test_the_openai_client_gets_the_images_of_its_seeds(serve, connect):
    client = connect(serve())
    answer = client.images.generate(prompt="a red circle", n=3, size="auto", extra_body={"seed": 7})
    assert [item.seed for item in answer.data] == [7, 8, 9]
    assert answer.size == "64x64"
    assert answer.output_format == "png"
    assert answer.usage.input_tokens == 5
    assert answer.usage.total_tokens == 5 + 3 * 16
    assert picture(answer).size == (64, 64)
    again = client.images.generate(prompt="a red circle", extra_body={"seed": 8})
    assert again.data[0].b64_json == answer.data[1].b64_json
    assert client.images.generate(prompt="a", size="128x64", model="simulator").size == "128x64"


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_formats(serve, connect, name, kind):
    answer = connect(serve()).images.generate(prompt="a", output_format=name)
    assert picture(answer).format == kind
    assert answer.output_format == name


def test_models_are_listed_and_shown(serve, connect):
    client = connect(serve())
    assert [model.id for model in client.models.list()] == ["simulator"]
    assert client.models.retrieve("simulator").owned_by == "simulator"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    "path", ["/", "/jobs", "/healthz", "/metrics", "/openapi.json", "/v1/models", "/v1/models/simulator"]
)
def test_paths_are_served_with_and_without_a_slash_and_for_head(api, path):
    slashed = httpx.get(f"{api}{path.rstrip('/')}/")
    plain, head = httpx.get(f"{api}{path}"), httpx.head(f"{api}{path}")
    assert [answer.status_code for answer in (plain, slashed, head)] == [200] * 3
    assert head.content == b""
    assert int(head.headers["content-length"]) > 0
    assert head.headers["content-type"] == slashed.headers["content-type"] == plain.headers["content-type"]


def test_a_trailing_slash_is_accepted_for_every_method(api):
    assert httpx.post(f"{api}/v1/images/generations/", json={"prompt": "a"}).status_code == 200


def test_head_of_a_link_returns_the_headers(api):
    link = httpx.post(f"{api}/v1/images/generations", json={"prompt": "a", "response_format": "url"}).json()["data"][0]
    image, head = httpx.get(link["url"]), httpx.head(link["url"])
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(image.content)


@pytest.mark.parametrize("path", ["/", "", "/jobs", "/jobs/", "/healthz/", "/nothing/"])
def test_paths_are_served_below_a_prefix(path, tmp_path):
    app = create_app(Settings(data=None, images={"artifacts": str(tmp_path)}), worker_threads(Simulator(0, 0)))
    transport = httpx.ASGITransport(app, root_path="/images")

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/images") as client:
            return await client.get(f"http://localhost/images{path}")

    answer = asyncio.run(ask())
    assert answer.status_code == (404 if "nothing" in path else 200)


def test_a_page_finds_its_assets_with_and_without_a_slash(api):
    for path in ("/", "/jobs", "/jobs/", "/batches/"):
        page = httpx.URL(f"{api}{path}")
        html = httpx.get(page).text
        base = page.join(re.search(r'<base href="([^"]+)">', html)[1])
        for part in re.findall(r'(?:src|href)="(web/[^"]+)"', html):
            assert httpx.get(base.join(part)).status_code == 200


@pytest.fixture(scope="module")
def api():
    with serving(create_app(Settings(http={"max_body_bytes": 2000}), worker_threads(Simulator(0, 0)))) as url:
        yield url


def test_neutral_values_of_other_fields_are_accepted(api):
    neutral = {"quality": "auto", "background": "opaque", "moderation": "low", "stream": False, "partial_images": 0}
    body = {"prompt": "a", "n": None, "style": None, "response_format": "b64_json", "user": "me"} | neutral
    assert httpx.post(f"{api}/v1/images/generations", json=body).status_code == 200


def test_bodies_over_the_limit_are_refused_with_and_without_content_length(api, connect):
    with pytest.raises(openai.APIStatusError) as caught:
        connect(api).images.generate(prompt="x" * 5_000_000)
    assert caught.value.status_code == 413
    assert "2000 bytes" in caught.value.message
    answer = httpx.post(f"{api}/v1/images/generations", content=iter([b"x" * 1500] * 2))  # chunked, no length
    assert answer.status_code == 413


def test_an_unexpected_exception_is_an_error_object_with_the_request_id(serve, caplog):
    broken = Simulator(0, 0)
    broken.info = replace(broken.info, pixels_per_token=0)
    answer = httpx.post(f"{serve(broken)}/v1/images/generations", json={"prompt": "secret"})
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("server_error", None)
    assert answer.headers["x-request-id"] in error["message"]
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in caplog.text


def test_a_long_prompt_is_truncated_with_a_warning(api):
    answer = httpx.post(f"{api}/v1/images/generations", json={"prompt": "word " * 90}).json()
    assert "77 tokens" in answer["warnings"][0]
    assert answer["usage"]["input_tokens"] == 77
    assert "warnings" not in httpx.post(f"{api}/v1/images/generations", json={"prompt": "word"}).json()


def test_keys_are_required_if_they_are_set(serve, connect):
    url = serve(http={"api_keys": ("the-first-of-two-keys", "the-second-of-two-keys")})
    assert connect(url, "the-second-of-two-keys").models.list().data
    for key in ("wrong", "the-second-of-two-key"):
        with pytest.raises(openai.AuthenticationError) as caught:
            connect(url, key).images.generate(prompt="a")
        assert caught.value.code == "invalid_api_key"
    assert httpx.get(f"{url}/healthz").status_code == 200
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_the_container_health_check_uses_no_proxy(serve, monkeypatch):
    url = serve()
    monkeypatch.setenv("SERVICE_HTTP__PORT", url.rpartition(":")[2])
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    runpy.run_path(str(Path(__file__).parents[2] / "docker" / "healthcheck.py"))  # raises where the server is not ready


def test_concurrent_clients_share_batches(serve, connect):
    gate = Gate()
    url = serve(gate, engine={"max_batch": 16})
    client = connect(url)
    before = metric(url, "batch_images_count")
    with ThreadPoolExecutor(32) as pool:
        asked = [pool.submit(client.images.generate, prompt="a", extra_body={"seed": i}) for i in range(32)]
        until(lambda: metric(url, "queued_images") == 30)  # one runs, one is ready behind it
        gate.open.set()
        assert [done.result().data[0].seed for done in asked] == list(range(32))
    assert metric(url, "images_total") == 32
    assert metric(url, "batch_images_count") - before == 4  # of 1, 1, 16 and 14 images


def test_a_full_queue_sends_retry_after(serve, connect):
    gate = Gate()
    url = serve(gate, engine={"max_queued_images": 10, "max_batch": 10})
    client = connect(url)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(client.images.generate, prompt="a", n=10)]
        assert gate.entered.wait(30)
        # one of these is taken as the batch behind the running one, the other fills the queue
        running += [pool.submit(client.images.generate, prompt=prompt, n=10) for prompt in "bc"]
        until(lambda: metric(url, "queued_images") == 10)
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt="d")
        headers = caught.value.response.headers
        assert 1 <= int(headers["retry-after"]) == math.ceil(int(headers["retry-after-ms"]) / 1000)
        assert headers["x-queue-position"] == "10"
        assert caught.value.code == "queue_full"
        assert metric(url, "refusals_total", reason="queue_full") == 1
        gate.open.set()
        assert all(len(done.result().data) == 10 for done in running)


def test_a_queued_request_of_a_disconnected_client_is_dropped(serve, connect):
    gate = Gate()
    url = serve(gate, engine={"max_batch": 1})
    client = connect(url)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.images.generate, prompt="stays", n=2)
        assert gate.entered.wait(30)  # one of its images runs, the other is ready behind it
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port)) as leaving:
            body = b'{"prompt": "leaves"}'
            head = f"POST /v1/images/generations HTTP/1.1\r\nhost: {address.host}\r\ncontent-type: application/json\r\n"
            leaving.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: metric(url, "queued_images") == 1)
        until(lambda: metric(url, "requests_total", status="499") == 1)
        gate.open.set()
        assert len(running.result().data) == 2
    client.images.generate(prompt="later")
    assert metric(url, "dropped_images_total") == 1
    assert "leaves" not in gate.prompts


def test_a_request_may_set_its_timeout(serve, connect):
    gate = Gate()
    client = connect(serve(gate, engine={"max_batch": 1}))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.images.generate, prompt="a")
        assert gate.entered.wait(30)
        with pytest.raises(openai.InternalServerError) as missed:
            client.images.generate(prompt="b", extra_body={"timeout": 1})
        assert (missed.value.status_code, missed.value.code) == (504, "deadline_exceeded")
        gate.open.set()
        running.result()


def test_an_unreachable_deadline_is_refused_with_the_missing_time(serve, connect):
    gate = Gate()
    gate.slow = 0.2  # seconds of an image, as the warm-up finds it
    client = connect(serve(gate, engine={"max_batch": 1}))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.images.generate, prompt="a", n=10)
        assert gate.entered.wait(30)
        with pytest.raises(openai.RateLimitError) as refused:
            client.images.generate(prompt="b", extra_body={"timeout": 0.5})
        assert refused.value.code == "deadline_unreachable"
        assert (
            1.5 <= int(refused.value.response.headers["retry-after-ms"]) / 1000 <= 10
        )  # 11 images, less half a second
        gate.slow = 0
        gate.open.set()
        running.result()


def test_one_bad_image_does_not_fail_its_batch(serve, connect):
    gate = Gate(fails_on="poison")
    url = serve(gate)
    client = connect(url)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(client.images.generate, prompt="first")
        assert gate.entered.wait(30)
        good = [pool.submit(client.images.generate, prompt=f"good {i}") for i in range(4)]
        bad = pool.submit(client.images.generate, prompt="poison")
        gate.open.set()
        assert all(len(done.result().data) == 1 for done in [first, *good])
        with pytest.raises(openai.InternalServerError) as caught:
            bad.result()
        assert "simulated" not in str(caught.value)
