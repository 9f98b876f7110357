"""Connections: headers that are too large or slow, data that is not HTTP, clients that do not read."""

import contextlib
import json
import socket

import httpx
import pytest
from running import metric, serving, until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from worker_threads import worker_threads

from service.app import create_app
from service.engine.simulator import Simulator
from service.http.protocol import HttpProtocol
from service.observability.logs import is_server_fault
from service.settings import Settings

LINE = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"
LIMIT = HttpProtocol.max_head_bytes


class Hasty(HttpProtocol):
    """Short timeouts, but long enough for a client on a busy machine."""

    head_seconds = 1.0
    stall_seconds = 0.5


@pytest.fixture(scope="module")
def patient():
    with serving(create_app(Settings(data=None), worker_threads(Simulator(0, 0)))) as url:
        yield url


@pytest.fixture(scope="module")
def hasty(tmp_path_factory):
    settings = Settings(data=tmp_path_factory.mktemp("data"), http={"realtime_idle_seconds": 2})
    with serving(create_app(settings, worker_threads(Simulator(0, 0))), Hasty) as url:
        yield url


def dial(url: str) -> socket.socket:
    address = httpx.URL(url)
    return socket.create_connection((address.host, address.port), timeout=30)


def rest(line: socket.socket) -> bytes:
    """Return all data until the server closes the connection."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while piece := line.recv(1 << 16):
            said += piece
    return said


def refused(said: bytes, status: int) -> dict:
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"x-request-id: req_" in head
    assert b"connection: close" in head.lower()
    return json.loads(body)["error"]


def closed_connections(url: str, reason: str) -> float:
    return metric(url, "closed_connections_total", reason=reason)


@pytest.mark.parametrize(
    "head",
    [
        LINE + b"x: " + b"a" * LIMIT + b"\r\n\r\n",
        LINE + b"x: y\r\n" * LIMIT + b"\r\n",
        LINE + b"x: " + b"a" * 4 * LIMIT,  # which never ends
        b"GET /healthz?" + b"a" * LIMIT + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * LIMIT + b"\r\n",
    ],
    ids=["one", "many", "endless", "path", "trailers"],
)
def test_a_head_over_the_limit_is_refused(patient, head):
    with dial(patient) as line:
        with contextlib.suppress(ConnectionError):
            line.sendall(head)
        said = rest(line)
    if said:  # what the server has not read may take its answer with it
        assert b" 431 " in said
    assert httpx.get(f"{patient}/healthz", headers={"x": "a" * (LIMIT - 1000)}).status_code == 200


def test_a_refused_head_has_an_error_object(patient):
    with dial(patient) as line:
        before = closed_connections(patient, "head_too_large")
        line.sendall(LINE + b"x: " + b"a" * (LIMIT + 1) + b"\r\n\r\n")
        assert "65536 bytes" in refused(rest(line), 431)["message"]
        assert closed_connections(patient, "head_too_large") == before + 1


@pytest.mark.parametrize("text", [b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"])
def test_data_that_is_not_http_gets_an_error(patient, text):
    with dial(patient) as line:
        before = closed_connections(patient, "invalid_http")
        line.sendall(text)
        assert refused(rest(line), 400)["code"] == "invalid_http"
        assert closed_connections(patient, "invalid_http") == before + 1


HEAD = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
OFFERS = {
    "h2c": b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAAAA\r\n",
    "tls": b"connection: upgrade\r\nupgrade: TLS/1.3, HTTP/2.0\r\n",
    "websocket": b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n",  # of a POST
    "none": b"",
}
BODY = json.dumps({"prompt": "a", "seed": 7}).encode()
FRAMED = {
    "length": b"content-length: %d\r\n\r\n" % len(BODY) + BODY,
    "chunked": b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("framed", FRAMED)
@pytest.mark.parametrize("offer", OFFERS)
def test_an_upgrade_offer_is_ignored(patient, offer, framed):
    request = HEAD + OFFERS[offer] + FRAMED[framed]
    with dial(patient) as line:
        line.sendall(request + request + LINE + b"connection: close\r\n\r\n")
        answers = rest(line)
    assert answers.count(b"HTTP/1.1 200 ") == answers.count(b"HTTP/1.1 ") == 3
    assert answers.count(b'"seed":7') == 2


def test_a_body_after_an_upgrade_offer_is_read(patient):
    head, body = (HEAD + b"expect: 100-continue\r\n" + OFFERS["h2c"] + FRAMED["length"]).split(b"\r\n\r\n")
    with dial(patient) as line:
        line.sendall(head.replace(b"Upgrade,", b"Upgrade, close,") + b"\r\n\r\n")
        assert line.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.sendall(body)
        assert rest(line).startswith(b"HTTP/1.1 200 ")


def test_connect_is_refused(patient):
    with dial(patient) as line:
        line.sendall(b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost:80\r\n\r\n")
        assert refused(rest(line), 400)["code"] == "invalid_http"


@pytest.mark.parametrize(
    "host",
    [b"[::1", b"[zz]", b"::1]", b"a b", b"a/b", b"a@b", b"a:b", b"a:999999", b"\xff", b"localhost\r\nhost: localhost"],
)
@pytest.mark.parametrize("path", [b"/healthz", b"/v1/models", b"/v1/nothing"])
def test_an_invalid_host_is_refused(patient, host, path):
    with dial(patient) as line:
        line.sendall(b"GET %s HTTP/1.1\r\nconnection: close\r\nhost: %s\r\n\r\n" % (path, host))
        head, _, body = rest(line).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_host"


SHAKE = b"connection: Upgrade\r\nupgrade: websocket\r\n"
SHAKE += b"sec-websocket-version: 13\r\nsec-websocket-key: AQIDBAUGBwgJCgsMDQ4PEA=="


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (b"/v1/realtime/images", b"host: [::1", 400),
        (b"/v1/realtime/images", b"host: [zz]:1", 400),
        (b"/v1/realtime/images", b"host: localhost\r\nhost: localhost", 400),
        (b"/v1/realtime/images", b"host: localhost\r\norigin: http://[::1", 403),
        (b"/v1/realtime/images", b"host: localhost\r\norigin: http://[zz]", 403),
        (b"/v1/realtime/images", b"host: localhost\r\norigin: \xff", 403),
        (b"/v1/realtime/images", b"host: localhost\r\norigin: ", 403),
        (b"/v1/nothing", b"host: localhost", 404),
    ],
)
def test_a_websocket_with_an_invalid_path_host_or_origin_is_refused(patient, path, headers, status, caplog):
    with dial(patient) as line:
        line.sendall(b"GET %s HTTP/1.1\r\n%s\r\n%s\r\n\r\n" % (path, headers, SHAKE))
        assert refused(rest(line), status)["message"]
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert not any(map(is_server_fault, errors))


def test_a_message_that_is_not_utf8_closes_the_websocket_and_leaves_no_traceback(patient, caplog):
    with dial(patient) as line:
        line.sendall(b"GET /v1/realtime/images HTTP/1.1\r\nhost: localhost\r\n%s\r\n\r\n" % SHAKE)
        assert line.recv(1 << 16).startswith(b"HTTP/1.1 101 ")
        line.sendall(b"\x81\x81\0\0\0\0\xff")
        assert rest(line) == b"\x88\x02" + (1007).to_bytes(2)
    (record,) = [record for record in caplog.records if record.exc_info]
    assert not is_server_fault(record)  # so the log of a server does not have it


def test_a_request_whose_body_is_invalid_has_one_id(patient, caplog):
    caplog.set_level("INFO")
    with dial(patient) as line:
        line.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\nthis is no number\r\n")
        said = rest(line)
    assert refused(said, 400)["code"] == "invalid_http"
    request_id = said.partition(b"x-request-id: ")[2].partition(b"\r\n")[0].decode()
    until(lambda: "generations 499" in caplog.text)
    assert {record.request_id for record in caplog.records if hasattr(record, "request_id")} == {request_id}


@pytest.mark.parametrize("origin", ["http://[::1", "http://[zz]:1", "http://a:b", "\xff", "", "null"])
def test_an_invalid_origin_is_a_foreign_one(patient, origin):
    refused = httpx.get(f"{patient}/v1/models", headers={"origin": origin.encode("latin-1")})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed")


def test_an_idle_connection_stays_open_for_keep_alive_seconds(patient):
    settings = Settings(data=None, http={"keep_alive_seconds": 1})
    assert Settings(data=None).http.keep_alive_seconds > 60  # proxies keep theirs for so long
    with (
        serving(create_app(settings, worker_threads(Simulator(0, 0)))) as url,
        dial(url) as line,
        dial(patient) as longer,
    ):
        head = LINE.replace(b"GET", b"HEAD") + b"\r\n"  # whose answer comes as one piece
        for each in (line, longer):
            each.sendall(head)
            assert each.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        assert rest(line) == b""
        longer.sendall(head)
        assert longer.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("path", "kind"), [("/v1/files", "multipart/form-data; boundary=x"), ("/v1/images/generations", "application/json")]
)
def test_a_client_that_disconnects_during_its_upload_is_not_a_server_error(hasty, caplog, path, kind):
    before = metric(hasty, "requests_total", status="499")
    with caplog.at_level("INFO"):
        with dial(hasty) as line:
            line.sendall(
                f"POST {path} HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n"
                f"content-type: {kind}\r\ncontent-length: 1000\r\n\r\n".encode()
            )
            assert line.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
            line.sendall(b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\na')
        until(lambda: metric(hasty, "requests_total", status="499") == before + 1)
        until(lambda: f"POST {path} 499" in caplog.text)
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_an_incomplete_head_times_out(hasty):
    with dial(hasty) as line:
        line.sendall(LINE)
        assert "within 1 s" in refused(rest(line), 408)["message"]
    assert closed_connections(hasty, "head_too_slow") == 1


@pytest.mark.parametrize("said", [b"", b"\r\n"])
def test_a_connection_without_a_request_is_closed(hasty, said):
    with dial(hasty) as line:
        line.sendall(said)
        assert rest(line) == b""


def test_incomplete_bytes_after_a_response_time_out(hasty):
    with dial(hasty) as line:
        line.sendall(b"POST /v1/nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}}"):  # the head and the body may come apart
            answer += line.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 404 ")
        line.sendall(b"a")
        assert rest(line) == b""


def test_a_websocket_has_no_head_timeout(hasty):
    with connect(hasty.replace("http", "ws") + "/v1/realtime/images") as session:
        with pytest.raises(ConnectionClosed) as closed:
            session.recv(30)
        assert closed.value.rcvd.code == 1000  # after two seconds, by the session itself


def test_a_connection_whose_client_reads_nothing_is_closed(hasty):
    size = 24 << 20
    file = {"file": ("large.jsonl", bytes(size)), "purpose": (None, "batch")}
    uploaded = httpx.post(f"{hasty}/v1/files", files=file, timeout=60).json()
    with dial(hasty) as line:
        line.sendall(f"GET /v1/files/{uploaded['id']}/content HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        until(lambda: metric(hasty, "requests_total", route="/v1/files/{file_id}/content") == 1)
        assert len(rest(line)) < size
    assert closed_connections(hasty, "answer_not_taken") == 1
