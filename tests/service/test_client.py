"""The real OpenAI client: plain, raw, streamed and asynchronous calls, and unsupported routes."""

import asyncio
import time

import openai
import pytest
from running import serving
from worker_threads import worker_threads

from service import errors
from service.app import create_app
from service.engine.simulator import Simulator
from service.errors import HTTP_STATUS, ServiceError
from service.settings import Settings


@pytest.fixture(scope="module")
def api():
    with serving(
        create_app(Settings(data=None, aliases={"dall-e-3": "simulator"}), worker_threads(Simulator(0, 0)))
    ) as url:
        yield url


def test_every_error_class_has_an_http_status():
    known = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServiceError)}
    assert set(HTTP_STATUS) == known


def test_the_raw_client_reads_headers(api, connect):
    raw = connect(api).images.with_raw_response.generate(prompt="a", extra_body={"seed": 1})
    assert "model;dur=" in raw.headers["server-timing"]
    answer = raw.parse()
    assert answer.data[0].seed == 1
    assert answer._request_id == raw.headers["x-request-id"]
    with connect(api).images.with_streaming_response.generate(prompt="a", extra_body={"seed": 1}) as streamed:
        assert streamed.parse().data[0].b64_json == answer.data[0].b64_json


def test_the_asynchronous_client_gets_the_same_images(api, connect):
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0) as client:
            answers = [client.images.generate(prompt="a", extra_body={"seed": seed}) for seed in range(4)]
            made = [answer.data[0].b64_json for answer in await asyncio.gather(*answers)]
            async for event in await client.images.generate(prompt="a", stream=True, extra_body={"seed": 0}):
                assert event.b64_json == made[0]
            assert [model.id async for model in client.models.list()] == ["simulator", "dall-e-3"]
        return made

    answer = connect(api).images.generate(prompt="a", n=4, extra_body={"seed": 0})
    assert asyncio.run(ask()) == [item.b64_json for item in answer.data]


def test_responses_have_every_field_of_the_clients_types(api, connect):
    """The client validates nothing, so a missing field would be noticed only when it is read."""
    before = int(time.time())
    answer = connect(api).images.generate(prompt="a", model="dall-e-3", size="128x64", quality="standard")
    assert before <= answer.created <= time.time()
    assert (answer.background, answer.output_format, answer.size) == ("opaque", "png", "128x64")
    usage = answer.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.text_tokens == usage.input_tokens
    assert usage.output_tokens_details.image_tokens == usage.output_tokens == 32
    for event in connect(api).images.generate(prompt="a", stream=True):
        assert event.usage.total_tokens == event.usage.input_tokens + event.usage.output_tokens
    model = connect(api).models.retrieve("dall-e-3")
    assert (model.id, model.object, model.owned_by) == ("dall-e-3", "model", "simulator")


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.images.edit(image=b"a", prompt="a"),
        lambda client: client.uploads.create(bytes=1, filename="a", mime_type="a", purpose="batch"),
        lambda client: client.chat.completions.create(model="simulator", messages=[]),
        lambda client: client.files.list(),  # nothing is kept here
        lambda client: client.batches.list(),
        lambda client: client.fine_tuning.jobs.list(),
        lambda client: client.models.delete("simulator"),
    ],
)
def test_unsupported_routes_are_errors_of_the_client(api, connect, call):
    with pytest.raises(openai.NotFoundError) as caught:
        call(connect(api))
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id.startswith("req_")


def test_the_client_retries_after_retry_after(serve):
    url = serve(Simulator(0, 0), http={"rate_limit": "1/second"})
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1) as client:
        for _ in range(3):
            assert client.images.generate(prompt="a").data
