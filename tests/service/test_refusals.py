"""Bad requests: each is refused with the right status and a complete error object, and none reaches the model."""

import json

import httpx
import pytest
from running import metric, serving

from service.app import create_app
from service.engine.backend import Simulator
from service.engine.launch import local
from service.settings import Settings

PATH = "/v1/images/generations"

FIELDS = [
    *[("prompt", value) for value in (None, "", 3, 1.5, True, [], ["a"], {}, {"text": "a"}, "x" * 32_001)],
    *[("n", value) for value in (0, -1, 11, 10**20, 1.5, "1", True, [], {})],
    *[("size", value) for value in ("", "big", "0x0", "64", "64x", "x64", "64X64", "-64x64", "064x64", " 64x64")],
    *[("size", value) for value in ("64x64x64", "64x65", "99999x99999", "999999x1", 64, [64, 64], {}, "６４x６４")],
    *[("model", value) for value in (3, [], {}, True)],
    *[("response_format", value) for value in ("", "png", "B64_JSON", 1, [], True)],
    *[("output_format", value) for value in ("", "gif", "PNG", "jpg", 1, [], True)],
    *[("output_compression", value) for value in (-1, 101, 50.5, "50", True, 50)],  # the last: png is lossless
    *[("quality", value) for value in ("hd", "low", "medium", "high", "best", 1)],
    *[("background", value) for value in ("transparent", "white", 1)],
    *[("moderation", value) for value in ("off", 1)],
    *[("style", value) for value in ("vivid", "natural", 1)],
    *[("stream", value) for value in ("true", 1, 0, [])],
    *[("partial_images", value) for value in (-1, 4, 1, "1", True)],  # 1: only with stream
    *[("user", value) for value in (1, [], "x" * 257)],
    *[("priority", value) for value in ("low", "BATCH", 0)],
    *[("lora", value) for value in ("style", 1, [])],
    *[("timeout", value) for value in (0, 0.01, -1, 3601, "1", True, [])],
    *[("seed", value) for value in (-1, 2**53, 1.0, "1", True, [], {})],
    *[(name, "a") for name in ("negative_prompt", "Prompt", "steps", "guidance_scale", "__proto__", "id")],
]

BODIES = [
    "",
    " ",
    "{",
    "[]",
    "[1]",
    "null",
    "3",
    '"a"',
    "true",
    '{"prompt": "a"',
    "{'prompt': 'a'}",
    "\x00",
    "prompt=a",
]

PATHS = [
    ("GET", PATH, 405),
    ("PUT", PATH, 405),
    ("DELETE", "/v1/models/simulator", 405),
    ("POST", "/v1/models", 405),
    ("POST", "/healthz", 405),
    ("GET", "/v1", 404),
    ("POST", "/v1/images/edits", 404),
    ("POST", "/v1/images/generations/more", 404),
    ("GET", "/v1/models/other", 404),
    ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
    ("POST", "/v1/admin/models/simulator", 405),
    ("DELETE", "/v1/admin/models/other", 404),
    ("DELETE", "/v1/admin/models/simulator", 400),  # the only one
    ("GET", "/v1/realtime/images", 404),
    ("GET", "/docs", 404),
    ("GET", "/v1/artefacts/0000000000", 400),  # without a signature
    ("GET", "/v1/artefacts/..%2fkeys.json?signature=a", 404),
    ("GET", "/v1/artefacts/9999999999-00000000000000000000000000000000.png?signature=a", 404),
]


@pytest.fixture(scope="module")
def api():
    with serving(create_app(Settings(), local(Simulator(0, 0)))) as url:
        with httpx.Client(base_url=url) as client:
            yield client
        assert metric(url, "images_total") == 0


def refused(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_a_bad_field_is_named(api, field, value):
    error = refused(api.post(PATH, json={"prompt": "a", field: value}), 400)
    assert error["param"] == field


def test_an_unknown_model_is_not_found(api):
    error = refused(api.post(PATH, json={"prompt": "a", "model": "../other"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize("body", BODIES)
def test_a_bad_body_is_refused(api, body):
    refused(api.post(PATH, content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"])
def test_another_kind_of_body_is_refused(api, kind):
    refused(api.post(PATH, content=json.dumps({"prompt": "a"}), headers={"content-type": kind}), 400)


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_bad_idempotency_key_is_refused(api, key):
    error = refused(api.post(PATH, json={"prompt": "a"}, headers={"idempotency-key": key}), 400)
    assert error["param"].lower() == "idempotency-key"


@pytest.mark.parametrize(("method", "path", "status"), PATHS)
def test_a_bad_path_is_refused(api, method, path, status):
    refused(api.request(method, path), status)
