"""The pages over HTTP: what they load and what they may load."""

import re

import httpx


def test_pages_load_nothing_from_other_servers(serve):
    api = serve()
    for name in ("", "jobs", "batches"):
        page = httpx.get(f"{api}/{name}")
        assert page.headers["content-type"].startswith("text/html")
        assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
        assert "<script>" not in page.text  # the policy would refuse it
        for part in re.findall(r'(?:src|href)="(web/[^"]+)"', page.text):
            found = httpx.get(f"{api}/{part}")
            assert found.status_code == 200
            assert not re.search(r"https?://(?!www\.w3\.org)", page.text + found.text)
    assert httpx.get(f"{api}/web/../settings.py").status_code == 404
    assert httpx.get(f"{api}/web/none.js").status_code == 404
