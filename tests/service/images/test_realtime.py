"""Realtime sessions over a real server and an independent WebSocket client."""

import base64
import contextlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
from engines import Gate
from PIL import Image
from running import metric, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as dial

from service.engine.simulator import Simulator
from service.http.keys import KeyFile


@contextlib.contextmanager
def session(url: str, **options):
    with dial(f"{url.replace('http', 'ws')}/v1/realtime/images", max_size=None, open_timeout=60, **options) as socket:
        yield socket


def say(socket, **message) -> None:
    socket.send(json.dumps(message))


def ask(socket, **fields) -> None:
    say(socket, type="images.generate", **fields)


def hear(socket) -> dict:
    return json.loads(socket.recv(30))


def test_images_equal_those_of_the_rest_route(serve, connect):
    url = serve(Simulator(0, 0))
    with session(url) as socket:
        ask(socket, id="first", prompt="a red circle", seed=7, n=2)
        answer = hear(socket)
    assert (answer["type"], answer["id"], answer["size"]) == ("images.completed", "first", "64x64")
    assert [item["seed"] for item in answer["data"]] == [7, 8]
    posted = connect(url).images.generate(prompt="a red circle", n=2, extra_body={"seed": 7})
    assert [item["b64_json"] for item in answer["data"]] == [item.b64_json for item in posted.data]
    assert answer["usage"] == posted.usage.model_dump(exclude_none=True)
    assert {"queue", "model", "encode"} <= set(answer["seconds"])
    assert metric(url, "requests_total", route="/v1/realtime/images", status="200") == 1


def test_an_any_step_model_takes_steps(serve, connect):
    url = serve(Simulator(0, 0, info=replace(Simulator().info, max_steps=4)))
    posted = connect(url).images.generate(prompt="a", extra_body={"seed": 7, "steps": 3})
    with session(url) as socket:
        ask(socket, prompt="a", seed=7, steps=3)
        assert hear(socket)["data"][0]["b64_json"] == posted.data[0].b64_json
        ask(socket, prompt="a", steps=5)
        assert hear(socket)["error"]["param"] == "steps"


def test_binary_frames_follow_the_message(serve):
    with session(serve(Simulator(0, 0))) as socket:
        say(socket, type="session.start", frames="binary")
        assert hear(socket) == {"type": "session.started"}
        ask(socket, prompt="a", n=2, output_format="webp")
        assert [set(item) for item in hear(socket)["data"]] == [{"seed"}, {"seed"}]
        assert [Image.open(io.BytesIO(socket.recv(30))).format for _ in range(2)] == ["WEBP", "WEBP"]
        ask(socket, prompt="a")
        assert hear(socket)["type"] == "images.completed"


def test_the_latest_request_supersedes_waiting_ones_but_not_the_running_one(serve):
    gate = Gate()
    with session(serve(gate)) as socket:
        ask(socket, id="runs", prompt="runs")
        assert gate.entered.wait(30)
        for name in ("b", "c", "d"):
            ask(socket, id=name, prompt=name)
        assert [hear(socket) for _ in "bc"] == [{"type": "images.superseded", "id": name} for name in "bc"]
        gate.open.set()
        assert [(answer["type"], answer["id"]) for answer in (hear(socket), hear(socket))] == [
            ("images.completed", "runs"),
            ("images.completed", "d"),
        ]
    assert gate.prompts == ["runs", "d"]


def test_a_queued_request_is_superseded(serve, connect):
    gate = Gate()
    url = serve(gate, engine={"max_batch": 1})
    with ThreadPoolExecutor(1) as pool, session(url) as socket:
        posted = pool.submit(connect(url).images.generate, prompt="other", n=3)
        assert gate.entered.wait(30)
        until(lambda: metric(url, "queued_images") == 1)  # one runs, one is ready behind it
        ask(socket, id="old", prompt="old")
        until(lambda: metric(url, "queued_images") == 2)
        ask(socket, id="new", prompt="new")
        assert hear(socket) == {"type": "images.superseded", "id": "old"}
        gate.open.set()
        assert hear(socket)["id"] == "new"
        assert len(posted.result(60).data) == 3
    assert "old" not in gate.prompts


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("{", None),
        ("[]", None),
        ("{}", "type"),
        ('{"type": "other"}', "type"),
        ('{"type": "images.generate"}', "prompt"),
        ('{"type": "images.generate", "id": "7", "prompt": "a", "size": "64x65"}', "size"),
        ('{"type": "images.generate", "id": "7"}', "prompt"),
        ('{"type": "images.generate", "prompt": "a", "stream": true}', "stream"),
        ('{"type": "images.generate", "prompt": "a", "steps": 2}', "steps"),
        ('{"type": "images.generate", "prompt": "a", "model": "other"}', "model"),
    ],
)
def test_an_invalid_message_gets_an_error_and_the_session_continues(serve, text, param, caplog):
    caplog.set_level("INFO")
    with session(serve(Simulator(0, 0))) as socket:
        socket.send(text)
        answer = hear(socket)
        assert (answer["type"], answer["error"]["param"]) == ("error", param)
        assert answer["id"] == ("7" if '"id"' in text else None)
        assert answer["request_id"] in [getattr(record, "request_id", None) for record in caplog.records]
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        ask(socket, prompt="a")
        assert hear(socket)["type"] == "images.completed"


def test_keys_are_checked_for_every_message(serve, tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    token = file.create("ann", ["generate"])
    url = serve(Simulator(0, 0), http={"keys_file": tmp_path / "keys.json"})
    with session(url, additional_headers={"authorization": f"Bearer {token}"}) as socket:
        ask(socket, prompt="a")
        assert hear(socket)["type"] == "images.completed"
    for key in (None, "", "short", " "):
        with session(url) as socket:
            say(socket, type="session.start", api_key=key)
            assert hear(socket)["error"]["code"] == "invalid_api_key"
    with session(url) as socket:
        say(socket, type="session.start", api_key=token)
        assert hear(socket) == {"type": "session.started"}
        ask(socket, prompt="a")
        assert hear(socket)["type"] == "images.completed"
        file.revoke("ann")
        ask(socket, prompt="b")
        assert hear(socket)["error"]["code"] == "invalid_api_key"
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(30)
        assert closed.value.rcvd.code == 1008


def test_the_path_may_end_with_a_slash(serve):
    with dial(serve(Simulator(0, 0)).replace("http", "ws") + "/v1/realtime/images/", open_timeout=60) as socket:
        ask(socket, prompt="a")
        assert hear(socket)["type"] == "images.completed"


@pytest.mark.parametrize("header", ["api-key", "x-api-key"])
def test_a_key_is_read_from_the_headers_of_other_clients(serve, header):
    key = "a-key-for-these-tests"
    with session(serve(Simulator(0, 0), http={"api_keys": [key]}), additional_headers={header: key}) as socket:
        ask(socket, prompt="a")
        assert hear(socket)["type"] == "images.completed"


def test_with_warnings_an_unsupported_field_is_ignored_and_named(serve):
    with session(serve(Simulator(0, 0), images={"unsupported_fields": "warn"})) as socket:
        ask(socket, prompt="a", quality="medium", seed=-1, extra_body={}, partial_images=2, size="1024x1024")
        answer = hear(socket)
        assert (answer["type"], answer["size"], len(answer["warnings"])) == ("images.completed", "64x64", 5)
        ask(socket, prompt="a", quality="medium", response_format="url")
        assert hear(socket)["error"]["param"] == "response_format"


def test_other_origins_and_sessions_over_the_limit_are_refused(serve, caplog):
    caplog.set_level("INFO")
    url = serve(Simulator(0, 0), http={"cors_origins": ["https://friend.example"], "max_realtime_sessions": 1})
    own = httpx.URL(url)

    def refusal(**options) -> str:
        with pytest.raises(InvalidStatus, match="403") as caught, session(url, **options):
            pass
        response = caught.value.response
        assert response.headers["x-request-id"] in [getattr(record, "request_id", None) for record in caplog.records]
        return json.loads(response.body)["error"]["code"]

    for origin in ("https://evil.example", "null", f"http://{own.host}:1"):
        assert refusal(origin=origin) == "origin_not_allowed"
    for origin in (url, "https://friend.example"):
        with session(url, origin=origin) as socket:
            ask(socket, prompt="a")
            assert hear(socket)["type"] == "images.completed"
            assert refusal() == "too_many_sessions"
        until(lambda: metric(url, "realtime_sessions") == 0)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ('{"type": "%s"}' % ("x" * 500), "type must be"),
        ('{"type": "images.generate", "prompt": "a", "seed": %s}' % ("9" * 5000), "out of range"),
        ('{"type": "images.generate", "prompt": "a", "model": "%s"}' % ("x" * 500), "no model"),
        ('{"type": "images.generate", "prompt": "a", "%s": 1}' % ("x" * 500), "not supported"),
        ('{"type": "images.generate"', "not JSON"),
    ],
)
def test_the_error_of_a_message_has_the_reason_and_little_of_its_text(serve, message, reason):
    with session(serve(Simulator(0, 0))) as socket:
        socket.send(message)
        answer = socket.recv(30)
        assert reason in json.loads(answer)["error"]["message"]
        assert "x" * 201 not in answer


def test_idle_sessions_and_large_messages_close_the_connection(serve):
    url = serve(Simulator(0, 0), http={"realtime_idle_seconds": 0.2, "max_body_bytes": 200})
    with session(url) as socket, pytest.raises(ConnectionClosed) as closed:
        socket.recv(30)
    assert closed.value.rcvd.code == 1000
    for message, code in ((b"bytes", 1003), ("x" * 201, 1009)):
        with session(url) as socket:
            socket.send(message)
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(30)
            assert closed.value.rcvd.code == code


def test_rate_limits_apply_to_sessions(serve):
    with session(serve(Simulator(0, 0), http={"rate_limit": "2/minute"})) as socket:
        ask(socket, prompt="a", n=2)
        assert len(base64.b64decode(hear(socket)["data"][0]["b64_json"])) > 0
        ask(socket, prompt="b")
        answer = hear(socket)
        assert (answer["status"], answer["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 0 < answer["retry_after"] <= 60
