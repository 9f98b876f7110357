"""Web pages of other origins."""

from dataclasses import replace

import httpx
from running import generate

from service.engine.simulator import Simulator


def test_pages_of_other_origins_are_accepted_only_by_setting(serve):
    api = serve(http={"cors_origins": ("https://studio.example",)})
    asks = {
        "origin": "https://studio.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    allowed = httpx.options(f"{api}/v1/images/generations", headers=asks)
    assert allowed.headers["access-control-allow-origin"] == "https://studio.example"
    assert "x-stainless-lang" in allowed.headers["access-control-allow-headers"]
    other = httpx.options(f"{api}/v1/images/generations", headers=asks | {"origin": "https://other.example"})
    assert not {"access-control-allow-origin", "access-control-allow-headers"} & {*other.headers}
    closed = httpx.options(f"{serve()}/v1/images/generations", headers=asks)
    assert "access-control-allow-origin" not in closed.headers


def test_pages_of_accepted_origins_can_read_every_error(serve):
    broken = Simulator(0, 0)
    broken.info = replace(broken.info, pixels_per_token=0)
    url = serve(
        broken, http={"cors_origins": ("https://studio.example",), "max_body_bytes": 100, "rate_limit": "1/hour"}
    )
    for status, body in ((500, {"prompt": "a"}), (400, {}), (413, {"prompt": "a" * 200}), (429, {"prompt": "a"})):
        failed = httpx.post(f"{url}/v1/images/generations", json=body, headers={"origin": "https://studio.example"})
        assert failed.status_code == status
        assert failed.headers["access-control-allow-origin"] == "https://studio.example"
        assert "x-request-id" in failed.headers["access-control-expose-headers"]


def test_a_star_in_an_allowed_origin_matches_any_name(serve):
    url = serve(http={"cors_origins": ["chrome-extension://*", "https://*.example.com", "http://LOCALHOST:*"]})
    inside = ["chrome-extension://abcdefghijklmnop", "https://a.b.example.com", "http://localhost:5173"]
    outside = ["https://example.com", "https://evilexample.com", "https://a.example.com.evil.com", "null"]
    outside += ["http://a.example.com", "https://a.example.com:444", "moz-extension://a", "https://evil@.example.com"]
    outside += ["http://localhost:5173.evil.com"]
    for origin in inside + outside:
        answer = generate(url, {"origin": origin})
        assert (answer.status_code == 200) == (origin in inside), origin
        assert (answer.headers.get("access-control-allow-origin") == origin) == (origin in inside), origin
