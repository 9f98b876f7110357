"""The pages over HTTP: the files that they load, and those that they may load."""

import re

import httpx

from service.routers.pages import ASSETS


def test_pages_load_nothing_from_other_servers(serve):
    api = serve()
    for name in ("", "jobs", "batches", "docs"):
        page = httpx.get(f"{api}/{name}")
        assert page.headers["content-type"].startswith("text/html")
        assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
        assert "<script>" not in page.text  # the policy would refuse it
        assert not re.search(r"https?://", page.text)
        for part in re.findall(r'(?:src|href)="(web/[^"]+)"', page.text):
            assert httpx.get(f"{api}/{part}").status_code == 200
    for asset in ASSETS:
        text = httpx.get(f"{api}/web/{asset}").text
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg|iptc\.org/std)", text)  # names, which nothing loads
        for part in re.findall(r'from "\./([^"]+)"', text):
            assert part in ASSETS
    assert httpx.get(f"{api}/web/../settings.py").status_code == 404
    assert httpx.get(f"{api}/web/none.js").status_code == 404
