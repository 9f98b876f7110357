"""Ask a server everything once: health, readiness, an image twice, a refusal, its metrics. Needs Python alone.

python docker/check/smoke.py http://127.0.0.1:8000 [--key KEY]
"""

import argparse
import base64
import json
import struct
import time
import urllib.error
import urllib.request

PNG = b"\x89PNG\r\n\x1a\n"


def ask(url: str, key: str, body: object = None) -> tuple[int, bytes]:
    """Status and body of an answer; 0 where nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
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


def main() -> None:
    """Raises AssertionError at the first answer that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--key", default="", help="API key, where the server asks for one")
    parser.add_argument("--seconds", type=float, default=120, help="how long it may take to become ready")
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


if __name__ == "__main__":
    main()
