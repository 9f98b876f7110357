"""Ask a server everything once: health, readiness, an image twice, a refusal, its metrics, a batch. Needs Python alone.

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


def ask(url: str, key: str, body: object = None, kind: str = "application/json") -> tuple[int, bytes]:
    """Status and body of an answer to a JSON value, or to bytes of another kind; 0 where nobody answers."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": kind} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def image(url: str, key: str) -> bytes:
    """One image as PNG."""
    status, body = ask(f"{url}/v1/images/generations", key, {"prompt": "a red circle", "seed": 7})
    assert status == 200, body
    return base64.b64decode(json.loads(body)["data"][0]["b64_json"])


def told(answer: tuple[int, bytes]) -> dict[str, Any]:
    """What an answer says, if it is a good one."""
    status, body = answer
    assert status == 200, body
    said: dict[str, Any] = json.loads(body)
    return said


def batch(url: str, key: str, lines: int) -> None:
    """A bulk batch: each line is answered once, and the first one's link gives its image."""
    requests = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "a blue star"}}
        for i in range(lines)
    ]
    part = "--part\r\ncontent-disposition: form-data; name="
    form = f'{part}"purpose"\r\n\r\nbatch\r\n{part}"file"; filename="lines.jsonl"\r\n\r\n'
    form += "".join(json.dumps(each) + "\n" for each in requests) + "\r\n--part--\r\n"
    file = told(ask(f"{url}/v1/files", key, form.encode(), "multipart/form-data; boundary=part"))
    order = {"input_file_id": file["id"], "endpoint": "/v1/images/generations", "completion_window": "24h"}
    began = time.monotonic()
    made = told(ask(f"{url}/v1/batches", key, order))
    while made["status"] in ("validating", "in_progress", "finalizing"):
        assert time.monotonic() - began < 600, made
        time.sleep(0.5)
        status, body = ask(f"{url}/v1/batches/{made['id']}", key)
        made = json.loads(body) if status == 200 else made  # a server that starts anew does not answer
    assert made["status"] == "completed", made
    answers = ask(f"{url}/v1/files/{made['output_file_id']}/content", key)[1].splitlines()
    bodies = {answer["custom_id"]: answer["response"]["body"] for answer in map(json.loads, answers)}
    assert len(answers) == len(bodies) == lines, f"{len(answers)} answers to {lines} lines"
    assert ask(bodies["0"]["data"][0]["url"], "")[1].startswith(PNG), "the link gives no PNG"
    print(f"a batch of {lines} lines in {time.monotonic() - began:.1f} s, each answered once")


def main() -> None:
    """Raises AssertionError at the first answer that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--key", default="", help="API key, where the server asks for one")
    parser.add_argument("--seconds", type=float, default=120, help="how long it may take to become ready")
    parser.add_argument("--batch", type=int, metavar="LINES", help="also a bulk batch, which needs a data folder")
    given = parser.parse_args()
    url, key = given.url.rstrip("/"), given.key

    began = time.monotonic()
    while ask(f"{url}/readyz", "")[0] != 200:
        assert time.monotonic() - began < given.seconds, f"not ready after {given.seconds:g} s"
        time.sleep(0.5)
    print(f"ready after {time.monotonic() - began:.1f} s")
    assert ask(f"{url}/healthz", "") == (200, b'{"status":"ok"}')
    if key:
        assert ask(f"{url}/v1/models", "")[0] == 401, "a request without a key is let in"

    began = time.monotonic()
    first = image(url, key)
    width, height = struct.unpack(">II", first[16:24])
    assert first.startswith(PNG), "no PNG"
    print(f"an image of {width}x{height} in {time.monotonic() - began:.2f} s, {len(first)} bytes")
    assert image(url, key) == first, "the same seed gives other bytes"

    metrics = ask(f"{url}/metrics", "")[1].decode()
    made = [line for line in metrics.splitlines() if line.startswith("fgm_images_total{")]
    assert made, "no image in the metrics"
    print(*made, sep="\n")
    if given.batch:
        batch(url, key, given.batch)


if __name__ == "__main__":
    main()
