"""The web pages: playground, jobs, batches, API reference. They load nothing from other servers."""

from pathlib import Path
from string import Template

from fastapi import APIRouter, Request
from fastapi.responses import Response

from service.errors import NotFound, excerpt

router = APIRouter(include_in_schema=False)

WEB = Path(__file__).parents[1] / "web"
TITLES = {"index": "One-step playground", "jobs": "Distillation jobs", "batches": "Batches", "docs": "API reference"}
FRAME = Template((WEB / "frame.html").read_text(encoding="utf-8"))  # head, navigation and key dialog of all pages
PAGES = {
    (name, base): FRAME.substitute(
        base=base, title=title, name=name, main=(WEB / f"{name}.html").read_text(encoding="utf-8")
    )
    for name, title in TITLES.items()
    for base in ("./", "../")
}
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript"}
ASSETS = {path.name: path.read_bytes() for path in WEB.iterdir() if path.suffix in MEDIA_TYPES}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


@router.get("/")
async def playground() -> Response:
    """Images while a prompt is typed. The pages need no key; their requests do, if the server has keys."""
    return _page("index", "./")


@router.get("/jobs")
async def jobs(request: Request) -> Response:
    """Distillation jobs: start one, watch it, try its student."""
    return _page("jobs", _base(request))


@router.get("/batches")
async def batches(request: Request) -> Response:
    """Bulk batches: upload a file, watch it, download the answers."""
    return _page("batches", _base(request))


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The API reference, written by a script of this server from `/openapi.json`."""
    return _page("docs", _base(request))


@router.get("/web/{name}")
async def asset(name: str) -> Response:
    """A style sheet or script of the pages, as read at the start."""
    if name not in ASSETS:
        raise NotFound(f"there is no /web/{excerpt(name)}")
    return Response(ASSETS[name], media_type=MEDIA_TYPES[Path(name).suffix], headers=HEADERS)


def _base(request: Request) -> str:
    """Return the prefix of the page's links. They are relative, because a proxy may serve the pages below a prefix."""
    return "../" if request.scope.get("raw_path", b"").endswith(b"/") else "./"


def _page(name: str, base: str) -> Response:
    return Response(PAGES[name, base], media_type="text/html", headers=HEADERS)
