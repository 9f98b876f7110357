"""Invalid requests: each gets the right status and a complete error object, and none reaches the model."""

import gzip
import json
import re

import httpx
import pytest
from running import metric, serving
from worker_threads import worker_threads

from service.app import create_app
from service.engine.simulator import Simulator
from service.settings import Settings

PATH = "/v1/images/generations"

FIELDS = [
    *[("prompt", value) for value in (None, "", " ", "\t\n\u2003", 3, 1.5, True, [], ["a"], {}, "x" * 32_001)],
    *[("n", value) for value in (0, -1, 11, 10**20, 1.5, "1", True, [], {})],
    *[("size", value) for value in ("", "big", "0x0", "64", "64x", "x64", "64X64", "-64x64", "064x64", " 64x64")],
    *[
        ("size", value)
        for value in ("64x64x64", "64x65", "99999x99999", "999999x1", 64, [64, 64], {}, "６４x６４", "6４x6٤")
    ],
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
    *[("lora", value) for value in ("style", 1, [], True)],
    *[("timeout", value) for value in (0, 0.01, -1, 3601, "1", True, [])],
    *[("seed", value) for value in (-1, 2**53, 1.0, "1", True, [], {})],
    *[("steps", value) for value in (0, -1, 2, 1.0, "1", True, [], {})],
    *[(name, "a") for name in ("negative_prompt", "Prompt", "guidance_scale", "__proto__", "id")],
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
    '{"prompt": "a",}',
    '{"prompt": "a"} {"prompt": "b"}',
    '{"prompt": "a", "prompt": 1}',
    '{"prompt": "a", "timeout": NaN}',
    '{"prompt": "a", "timeout": Infinity}',
    '{"prompt": "a", "seed": 1e400}',
    '{"prompt": "a", "seed": ' + 5000 * "9" + "}",
    "[" * 100_000,
    b"\xff",
    b'{"prompt": "\xff"}',
    '{"prompt": "a", "n": 01}',
]

# What goes wrong within a field, or between fields: the request beside its prompt, and the name in `param`.
TOGETHER = [
    ({"lora": {}}, "lora.name"),
    ({"lora": {"name": ""}}, "lora.name"),
    ({"lora": {"name": 1}}, "lora.name"),
    ({"lora": {"name": "x" * 129}}, "lora.name"),
    ({"lora": {"name": "other"}}, "lora.name"),
    ({"lora": {"name": "../style"}}, "lora.name"),
    ({"lora": {"name": "style", "scale": 4.5}}, "lora.scale"),
    ({"lora": {"name": "style", "scale": "1"}}, "lora.scale"),
    ({"lora": {"name": "style", "path": "/etc"}}, "lora.path"),
    ({"seed": 2**53 - 1, "n": 2}, "seed"),
    ({"stream": True, "n": 2}, "n"),
    ({"stream": True, "response_format": "url"}, "response_format"),
    ({"stream": False, "partial_images": 2}, "partial_images"),
    ({"output_format": "png", "output_compression": 0}, "output_compression"),
    ({"output_format": "jpeg", "output_compression": 101}, "output_compression"),
    ({"size": "1024x1024", "quality": "standard"}, "size"),
]

# Against `Accept: image/png`.
ACCEPTING = [
    ({"n": 2}, "n"),
    ({"stream": True}, "stream"),
    ({"response_format": "url"}, "response_format"),
    ({"output_format": "webp"}, "output_format"),
]

PATHS = [
    ("GET", PATH, 405),
    ("PUT", PATH, 405),
    ("PUT", "/v1/models/simulator", 405),
    ("DELETE", "/v1/models/other", 404),
    ("POST", "/v1/models", 405),
    ("POST", "/healthz", 405),
    ("GET", "/v1", 404),
    ("GET", "/nothing", 404),
    ("POST", "/v1/images/edits", 404),
    ("POST", "/v1/images/generations/more", 404),
    ("GET", "/v1/models/other", 404),
    ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
    ("POST", "/v1/admin/models/simulator", 405),
    ("DELETE", "/v1/admin/models/other", 404),
    ("DELETE", "/v1/admin/models/simulator", 400),  # the only one
    ("GET", "/v1/realtime/images", 404),
    ("GET", "/redoc", 404),
    ("GET", "/v1/artifacts/0000000000", 400),  # without a signature
    ("GET", "/v1/artifacts/..%2fkeys.json?signature=a", 404),
    ("GET", "/v1/artifacts/9999999999-00000000000000000000000000000000.png?signature=a", 404),
]


BATCH = {"input_file_id": "file-none", "endpoint": PATH, "completion_window": "24h"}
JOB = {"model": "scenes", "training_file": "file-none"}

# JSON for the other routes: path, body, status, and the name in `param`.
POSTS = [
    ("/v1/batches", {}, 400, "input_file_id"),
    ("/v1/batches", BATCH, 404, "input_file_id"),
    ("/v1/batches", BATCH | {"input_file_id": "../keys"}, 404, "input_file_id"),
    ("/v1/batches", BATCH | {"input_file_id": 1}, 400, "input_file_id"),
    ("/v1/batches", BATCH | {"endpoint": "/v1/images/edits"}, 400, "endpoint"),
    ("/v1/batches", BATCH | {"completion_window": "1h"}, 400, "completion_window"),
    ("/v1/batches", BATCH | {"metadata": "a"}, 400, "metadata"),
    ("/v1/batches", BATCH | {"metadata": {"a": 1}}, 400, "metadata.a"),
    ("/v1/batches", BATCH | {"metadata": {"a": "x" * 513}}, 400, "metadata.a"),
    ("/v1/batches", BATCH | {"metadata": {str(i): "a" for i in range(17)}}, 400, "metadata"),
    ("/v1/batches", BATCH | {"output_expires_after": {"anchor": "now", "seconds": 3600}}, 400, None),
    ("/v1/batches", BATCH | {"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, None),
    ("/v1/batches", BATCH | {"priority": 1}, 400, "priority"),
    ("/v1/batches/none/cancel", None, 404, None),
    ("/v1/fine_tuning/jobs", {}, 400, "model"),
    ("/v1/fine_tuning/jobs", JOB, 404, "training_file"),
    ("/v1/fine_tuning/jobs", {"model": "scenes"}, 400, "training_file"),
    ("/v1/fine_tuning/jobs", JOB | {"model": "/etc"}, 404, "model"),
    ("/v1/fine_tuning/jobs", JOB | {"suffix": "a:b"}, 400, "suffix"),
    ("/v1/fine_tuning/jobs", JOB | {"suffix": "x" * 65}, 400, "suffix"),
    ("/v1/fine_tuning/jobs", JOB | {"seed": -1}, 400, "seed"),
    ("/v1/fine_tuning/jobs", JOB | {"validation_file": "file-none"}, 400, "validation_file"),
    ("/v1/fine_tuning/jobs", JOB | {"integrations": []}, 400, "integrations"),
    ("/v1/fine_tuning/jobs", JOB | {"method": {"type": "dpo"}}, 400, "method.type"),
    ("/v1/fine_tuning/jobs", JOB | {"distillation": {"images": 0}}, 400, "distillation.images"),
    ("/v1/fine_tuning/jobs", JOB | {"distillation": {"out": "/etc"}}, 400, "distillation.out"),
    ("/v1/fine_tuning/jobs/none/cancel", None, 404, None),
    ("/v1/fine_tuning/jobs/none/pause", None, 404, None),
    ("/v1/fine_tuning/jobs/none/resume", None, 404, None),
    ("/v1/admin/models", {"folder": "/etc"}, 400, "folder"),
    ("/v1/admin/models", {"folder": "a", "name": "a b"}, 400, "name"),
    ("/v1/admin/adapters", {"folder": "a", "name": "a"}, 400, "model"),
    ("/v1/admin/adapters", {"model": "simulator", "folder": "..", "name": "a"}, 400, "folder"),
]

# Uploads: the form's fields beside a file of one line, and the name in `param`.
UPLOADS = [
    ({}, "purpose"),
    ({"purpose": ""}, "purpose"),
    ({"purpose": "vision"}, "purpose"),
    ({"purpose": "batch", "expires_after[anchor]": "created_at"}, "expires_after"),
    ({"purpose": "batch", "expires_after[seconds]": "3600"}, "expires_after"),
    ({"purpose": "batch", "expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after[anchor]"),
    ({"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}, None),
    ({"purpose": "batch", "path": "/etc/passwd"}, "path"),
]

# Lists and things of the other routes.
GETS = [
    ("/v1/files?limit=0", 400),
    ("/v1/files?limit=10001", 400),
    ("/v1/files?limit=all", 400),
    ("/v1/files?order=up", 400),
    ("/v1/files?purpose=vision", 400),
    ("/v1/files?after=file-none", 404),
    ("/v1/files/file-none", 404),
    ("/v1/files/..%2f..%2fkeys.json", 404),
    ("/v1/files/%00", 404),
    ("/v1/files/file-none/content", 404),
    ("/v1/batches?limit=101", 400),
    ("/v1/batches?after=batch_none", 404),
    ("/v1/batches/batch_none", 404),
    ("/v1/fine_tuning/jobs?limit=0", 400),
    ("/v1/fine_tuning/jobs?after=ftjob-none", 404),
    ("/v1/fine_tuning/jobs/ftjob-none", 404),
    ("/v1/fine_tuning/jobs/ftjob-none/events", 404),
    ("/v1/fine_tuning/jobs/ftjob-none/checkpoints", 404),
    ("/v1/fine_tuning/jobs/ftjob-none/sample", 404),
    ("/v1/fine_tuning/jobs/ftjob-none/log", 404),
    ("/v1/fine_tuning/jobs/ftjob-none/report", 404),
    ("/v1/batches/batch_none/images", 404),
    ("/web/none.js", 404),
    ("/web/..%2fsettings.py", 404),
]


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    settings = Settings(data=tmp_path_factory.mktemp("data"))
    with serving(create_app(settings, worker_threads(Simulator(0, 0)))) as url:
        with httpx.Client(base_url=url) as client:
            yield client
        assert metric(url, "images_total") == 0


def refused(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"].startswith("req_")
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert not re.search(
        r"dictionary|instance of|Value error|pattern|after validation", error["message"]
    )  # words of pydantic
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_an_invalid_field_is_named(api, field, value):
    error = refused(api.post(PATH, json={"prompt": "a", field: value}), 400)
    assert error["param"] == field


@pytest.mark.parametrize(("fields", "param"), TOGETHER)
def test_an_invalid_combination_of_fields_is_named(api, fields, param):
    assert refused(api.post(PATH, json={"prompt": "a", **fields}), 400)["param"] == param


@pytest.mark.parametrize(("fields", "param"), ACCEPTING)
def test_a_field_that_contradicts_the_accept_header_is_named(api, fields, param):
    answer = api.post(PATH, json={"prompt": "a", **fields}, headers={"accept": "image/png"})
    assert refused(answer, 400)["param"] == param


def test_an_unknown_model_is_not_found(api):
    error = refused(api.post(PATH, json={"prompt": "a", "model": "../other"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize("body", BODIES)
def test_an_invalid_body_is_refused(api, body):
    refused(api.post(PATH, content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("body", ["{}", '{"prompt": "\\ud800"}'])  # none, and half of a surrogate pair
def test_an_invalid_prompt_is_named(api, body):
    error = refused(api.post(PATH, content=body, headers={"content-type": "application/json"}), 400)
    assert error["param"] == "prompt"


UNREADABLE = [
    (gzip.compress(b'{"prompt": "a"}', mtime=0), {"content-encoding": "gzip"}, None, "Content-Encoding: gzip"),
    (b"{", {"content-encoding": "br"}, None, "Content-Encoding: br"),
    (gzip.compress(b'{"prompt": "a"}', mtime=0), {}, None, "UTF-8"),
    ('{"prompt": "é"}'.encode("latin-1"), {}, None, "UTF-8"),
    (b'{"prompt": "a", "seed": %s}' % (b"9" * 5000), {}, "seed", "4300 digits"),
    (b'{"prompt": "a", "lora": {"scale": -%s}}' % (b"9" * 5000), {}, "scale", "4300 digits"),
    (b"[%s]" % (b"9" * 5000), {}, None, "4300 digits"),
    (b"[" * 100_000, {}, None, "nested"),
    (b'{"seed": %s, "prompt": ' % (b"9" * 5000), {}, None, "4300 digits"),
    (b'{"seed": %s, "prompt": %s' % (b"9" * 5000, b"[" * 100_000), {}, None, "4300 digits"),
    (b'{"prompt": "a", "\\ud800": 1}', {}, None, "name of a field"),
    (b'{"prompt": "a",}', {}, None, "character 15"),
]


@pytest.mark.parametrize(("body", "headers", "param", "reason"), UNREADABLE)
def test_an_unreadable_body_is_refused_with_the_reason(api, body, headers, param, reason):
    error = refused(api.post(PATH, content=body, headers={"content-type": "application/json", **headers}), 400)
    assert error["param"] == param
    assert error["code"]
    assert reason in error["message"]


def test_a_stream_of_raw_images_is_refused_with_the_reason(api):
    answer = api.post(PATH, json={"prompt": "a", "stream": True, "n": 2}, headers={"accept": "image/png"})
    error = refused(answer, 400)
    assert error["param"] == "stream"
    assert "Accept: image/png" in error["message"]


@pytest.mark.parametrize(
    "content", [{"files": {"file": (None, "hello")}}, {"data": {"file": "a"}}, {"json": {"file": "a"}}]
)
def test_text_instead_of_a_file_is_refused_with_the_reason(api, content):
    error = refused(api.post("/v1/files", **content), 400)
    assert error["param"] == "file"
    assert "file=@" in error["message"]


LONG = "x" * 40_000  # longer than any field may be, and short enough for a head
HEADERS = ("accept", "authorization", "content-encoding", "content-type", "host", "idempotency-key", "origin")
WHOLE = BATCH | JOB | {"prompt": "a", "folder": "a", "name": "a"}  # all that some route requires


def operations(api):
    """Every operation of the server: method, path, names of its query parameters, and of its JSON body's fields."""
    described = api.get("/openapi.json").json()
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            query = [each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            schema = described["components"]["schemas"].get(body.get("$ref", "").rpartition("/")[2], {})
            yield method, path, query, schema.get("properties", {})


def long_requests(api):
    """Requests that are too long in one place: method, path, and the rest for httpx."""
    for path in (f"/{LONG}", f"/web/{LONG}"):
        yield "GET", path, {}
        yield "PUT", path, {}
    for name in HEADERS:
        yield "POST", PATH, {"headers": {"content-type": "application/json", name: LONG}, "content": "{"}
    for form in ({LONG: "a"}, {"purpose": LONG}, {"expires_after[anchor]": LONG}):
        yield "POST", "/v1/files", {"data": {"purpose": "batch"} | form, "files": {"file": ("a", b"a")}}
    for method, path, query, fields in operations(api):
        plain = re.sub(r"{\w+}", "a", path)
        yield method, re.sub(r"{\w+}", LONG, path), {"params": dict.fromkeys(query, "a")}
        for name in query:
            yield method, plain, {"params": {name: LONG}}
        whole = {name: value for name, value in WHOLE.items() if name in fields}
        for name in fields:
            for value in (LONG, [LONG], {LONG: LONG}, {"name": LONG}, {"type": LONG}):
                yield method, plain, {"json": whole | {name: value}}
        if fields:
            yield method, plain, {"json": whole | {LONG: 1}}


def test_errors_repeat_little_text_of_the_request(api):
    for method, path, content in long_requests(api):
        answer = api.request(method, path, **content)
        assert answer.is_success or LONG[:201] not in answer.text + str(answer.headers), (path[:99], str(content)[:99])


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"])
def test_a_body_of_another_media_type_is_refused(api, kind):
    error = refused(api.post(PATH, content=json.dumps({"prompt": "a"}), headers={"content-type": kind}), 400)
    assert "application/json" in error["message"]


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_an_invalid_idempotency_key_is_refused(api, key):
    error = refused(api.post(PATH, json={"prompt": "a"}, headers={"idempotency-key": key}), 400)
    assert error["param"].lower() == "idempotency-key"


@pytest.mark.parametrize(("method", "path", "status"), PATHS)
def test_an_unknown_path_or_method_is_refused(api, method, path, status):
    answer = api.request(method, path)
    refused(answer, status)
    assert ("allow" in answer.headers) == (status == 405)


def test_all_allowed_methods_of_a_path_are_named(api):
    answer = api.put("/v1/models/simulator")
    assert answer.headers["allow"] == "HEAD, GET, DELETE"
    assert "takes HEAD, GET, DELETE only" in refused(answer, 405)["message"]
    assert api.head(PATH).headers["allow"] == "POST"


@pytest.mark.parametrize(("path", "body", "status", "param"), POSTS)
def test_an_invalid_body_of_another_route_is_refused(api, path, body, status, param):
    error = refused(api.post(path, json=body), status)
    assert param in (None, error["param"])


@pytest.mark.parametrize(("fields", "param"), UPLOADS)
def test_an_invalid_upload_is_refused(api, fields, param):
    error = refused(api.post("/v1/files", data=fields, files={"file": ("a.jsonl", b"{}\n")}), 400)
    assert param in (None, error["param"])


@pytest.mark.parametrize(
    "content",
    [
        {"data": {"purpose": "batch"}, "files": {"other": ("a", b"a")}},
        {"data": {"purpose": "batch"}, "files": {"file": ("a", b"")}},
        {"data": {"purpose": "batch", "file": "a"}},
        {"data": {"purpose": "batch"}, "files": [("file", ("a", b"a")), ("file", ("b", b"b"))]},
        {"json": {"purpose": "batch"}},
        {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=y"}},
        {"content": b"a", "headers": {"content-type": "multipart/form-data"}},
    ],
    ids=["no file", "empty", "text", "two", "json", "broken", "no boundary"],
)
def test_a_body_that_is_not_an_upload_is_refused(api, content):
    refused(api.post("/v1/files", **content), 400)


@pytest.mark.parametrize(("part", "status"), [("bytes=9-", 416), ("bytes=b", 400), ("lines=0-1", 400)])
def test_a_part_that_a_file_does_not_have_is_refused(api, part, status):
    file = api.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", b"{}\n")}).json()
    answer = api.get(f"/v1/files/{file['id']}/content", headers={"range": part})
    assert refused(answer, status)["param"] == "Range"
    assert answer.headers.get("content-range") == ("bytes */3" if status == 416 else None)


@pytest.mark.parametrize(("path", "status"), GETS)
def test_unknown_resources_and_invalid_queries_are_refused(api, path, status):
    refused(api.get(path), status)
