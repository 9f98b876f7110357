"""`/`: a page to try the server in. It holds everything itself, and its policy lets the browser load nothing else."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

PAGE = (Path(__file__).parents[1] / "web" / "index.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    """The page's own scripts or styles, as a content security policy names them."""
    digests = [hashlib.sha256(code.encode()).digest() for code in re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


POLICY = (
    f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/")
async def page() -> HTMLResponse:
    """The playground. Open to all: what it asks for needs a key where the server has keys."""
    return HTMLResponse(PAGE, headers={"content-security-policy": POLICY, "referrer-policy": "no-referrer"})
