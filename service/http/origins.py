"""Which web pages may call, and by which names the server is called: what keeps foreign pages out where no key does."""

import ipaddress
import re
from urllib.parse import urlsplit

from service.errors import Forbidden, excerpt, quoted
from service.settings import Settings

_HOST = re.compile(r"(\[[\w:.%~-]+\]|[\w.~%!$&'()*+,;=-]*)(?::\d{0,5})?", re.ASCII)  # RFC 3986, 3.2.2


def allowed(origin: str, host: str, settings: Settings) -> bool:
    """Whether a page of this origin may call a server that is called by `host`: one of ours, or one of the settings."""
    own = {host, urlsplit(settings.public_url or "").netloc}
    page = origin.partition("://")[2]  # none in the origin "null"
    return bool(page and page in own) or any(re.fullmatch(pattern(each), origin) for each in settings.cors_origins)


def pattern(origin: str) -> str:
    """The regular expression of an allowed origin. `*` is any origin, any port, or any part of a host's name."""
    return ".*" if origin == "*" else re.escape(origin).replace(r":\*", ":[0-9]+").replace(r"\*", "[A-Za-z0-9.-]+")


def host_of(header: str) -> str | None:
    """Return the name or address in a `Host` header, in lower case and without brackets; None if it is not valid."""
    found = _HOST.fullmatch(header)
    if found is None:
        return None
    name = found[1].lower()
    if not name.startswith("["):
        return name
    try:
        return str(ipaddress.IPv6Address(name[1:-1]))
    except ValueError:
        return None


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
            f"pages of {excerpt(origin)} may not call; the setting cors_origins lets them", code="origin_not_allowed"
        )
    name = host_of(host) or ""
    known = {settings.host, urlsplit(settings.public_url or "").hostname}
    if not (settings.open_to_all or name in known or is_loopback(name)):
        raise Forbidden(
            f"without API keys the server answers to the names of this machine, not to {quoted(name)}; make a key",
            code="host_not_allowed",
        )
