"""Which web pages may call, and by which names the server is called: what keeps foreign pages out where no key does."""

import ipaddress
from urllib.parse import urlsplit

from service.errors import Forbidden
from service.settings import Settings


def allowed(origin: str, host: str, settings: Settings) -> bool:
    """Whether a page of this origin may call a server that is called by `host`: one of ours, or one of the settings."""
    own = {host, urlsplit(settings.public_url or "").netloc}
    page = urlsplit(origin).netloc  # none in the origin "null"
    return bool(page and page in own) or bool({origin, "*"} & {*settings.cors_origins})


def is_loopback(name: str) -> bool:
    """Whether a host's name or address is this machine's own, seen by nobody else."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def check_open(origin: str | None, host: str, settings: Settings) -> None:
    """Raise Forbidden for what a browser was made to send to a server without keys, whose only guard is the loopback.

    A page elsewhere may send what needs no preflight, and a page whose name was re-bound to the loopback is of the
    server's own origin but calls it by its own name.
    """
    if origin is not None and not allowed(origin, host, settings):
        raise Forbidden(
            f"pages of {origin} may not call; the setting cors_origins lets them", code="origin_not_allowed"
        )
    name = urlsplit(f"//{host}").hostname or ""
    known = {settings.host, urlsplit(settings.public_url or "").hostname}
    if not (settings.open_to_all or name in known or is_loopback(name)):
        raise Forbidden(
            f"without API keys the server answers to the names of this machine, not to {name!r}; make a key",
            code="host_not_allowed",
        )
