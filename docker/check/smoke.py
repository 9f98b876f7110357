"""Smoke test of a server: health, readiness, an image twice, a refused request, metrics, a batch. Needs only Python.

python docker/check/smoke.py http://127.0.0.1:8000 [--key KEY] [--batch LINES]
"""

import argparse
import base64
import json
import struct
import time
import urllib.error
import urllib.request
from typing import Any

PNG = b"\x89PNG\r\n\x1a\n"


def request(url: str, key: str, body: object = None, kind: str = "application/json") -> tuple[int, bytes]:
    """Send a JSON value, or bytes of a media type. Returns status and body; the status is 0 without a response."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": kind} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def image(url: str, key: str) -> bytes:
    """Return one image as PNG."""
    status, body = request(f"{url}/v1/images/generations", key, {"prompt": "a red circle", "seed": 7})
    assert status == 200, body
    return base64.b64decode(json.loads(body)["data"][0]["b64_json"])


def content(response: tuple[int, bytes]) -> dict[str, Any]:
    """Return the JSON of a successful response."""
    status, body = response
    assert status == 200, body
    parsed: dict[str, Any] = json.loads(body)
    return parsed


def batch(url: str, key: str, lines: int) -> None:
    """Run a batch. Each line must be answered once, and the link of the first line must lead to its image."""
    requests = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "a blue star"}}
        for i in range(lines)
    ]
    part = "--part\r\ncontent-disposition: form-data; name="
    form = f'{part}"purpose"\r\n\r\nbatch\r\n{part}"file"; filename="lines.jsonl"\r\n\r\n'
    form += "".join(json.dumps(each) + "\n" for each in requests) + "\r\n--part--\r\n"
    file = content(request(f"{url}/v1/files", key, form.encode(), "multipart/form-data; boundary=part"))
    order = {"input_file_id": file["id"], "endpoint": "/v1/images/generations", "completion_window": "24h"}
    began = time.monotonic()
    created = content(request(f"{url}/v1/batches", key, order))
    while created["status"] in ("validating", "in_progress", "finalizing"):
        assert time.monotonic() - began < 600, created
        time.sleep(0.5)
        status, body = request(f"{url}/v1/batches/{created['id']}", key)
        created = json.loads(body) if status == 200 else created  # a server that restarts does not respond
    assert created["status"] == "completed", created
    answers = request(f"{url}/v1/files/{created['output_file_id']}/content", key)[1].splitlines()
    bodies = {answer["custom_id"]: answer["response"]["body"] for answer in map(json.loads, answers)}
    assert len(answers) == len(bodies) == lines, f"{len(answers)} answers to {lines} lines"
    assert request(bodies["0"]["data"][0]["url"], "")[1].startswith(PNG), "the link does not lead to a PNG"
    print(f"a batch of {lines} lines in {time.monotonic() - began:.1f} s, each answered once")


def main() -> None:
    """Raises AssertionError at the first wrong response."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--key", default="", help="API key, if the server requires one")
    parser.add_argument("--seconds", type=float, default=120, help="time limit for becoming ready")
    parser.add_argument("--batch", type=int, metavar="LINES", help="also run a batch of so many lines")
    given = parser.parse_args()
    url, key = given.url.rstrip("/"), given.key

    began = time.monotonic()
    while request(f"{url}/readyz", "")[0] != 200:
        assert time.monotonic() - began < given.seconds, f"not ready after {given.seconds:g} s"
        time.sleep(0.5)
    print(f"ready after {time.monotonic() - began:.1f} s")
    assert request(f"{url}/healthz", "") == (200, b'{"status":"ok"}')
    if key:
        assert request(f"{url}/v1/models", "")[0] == 401, "a request without a key is accepted"

    began = time.monotonic()
    first = image(url, key)
    width, height = struct.unpack(">II", first[16:24])
    assert first.startswith(PNG), "the image is not a PNG"
    print(f"an image of {width}x{height} in {time.monotonic() - began:.2f} s, {len(first)} bytes")
    assert image(url, key) == first, "the same seed gives different bytes"

    metrics = request(f"{url}/metrics", "")[1].decode()
    images = [line for line in metrics.splitlines() if line.startswith("fgm_images_total{")]
    assert images, "the metrics count no image"
    print(*images, sep="\n")
    if given.batch:
        batch(url, key, given.batch)


if __name__ == "__main__":
    main()
