"""Checks of the `Origin` and `Host` headers. They keep out foreign web pages where there is no API key."""

import ipaddress
import re
from urllib.parse import urlsplit

from service.errors import Forbidden, excerpt, quoted
from service.settings import Settings

_HOST = re.compile(r"(\[[\w:.%~-]+\]|[\w.~%!$&'()*+,;=-]*)(?::\d{0,5})?", re.ASCII)  # RFC 3986, 3.2.2


def check_origin(origin: str | None, host: str, settings: Settings) -> None:
    """Raise Forbidden for a page that is neither the server's own, which `host` names, nor one of `cors_origins`."""
    if origin is None:
        return
    own = {host, urlsplit(settings.http.public_url or "").netloc}
    page = origin.partition("://")[2]  # none in the origin "null"
    if page and page in own:
        return
    if not any(re.fullmatch(pattern(each), origin) for each in settings.http.cors_origins):
        raise Forbidden(
            f"pages of {excerpt(origin)} may not call; add them to the setting cors_origins", code="origin_not_allowed"
        )


def pattern(origin: str) -> str:
    """Return the regular expression of an allowed origin. `*` is any origin, any port, or any part of a host's name."""
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
    """Whether a host's name or address is that of this machine's loopback."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def check_open(origin: str | None, host: str, settings: Settings) -> None:
    """Raise Forbidden for a request of a foreign web page to a server without keys, which only the loopback protects.

    Such a page can send requests that need no preflight. A page whose name was rebound to the loopback (DNS rebinding)
    has the server's own origin, but a foreign `Host`.
    """
    check_origin(origin, host, settings)
    name = host_of(host) or ""
    known = {settings.http.host, urlsplit(settings.http.public_url or "").hostname}
    if not (settings.http.open_to_all or name in known or is_loopback(name)):
        raise Forbidden(
            f"without API keys the server answers to this machine's names only, not to {quoted(name)}; create a key",
            code="host_not_allowed",
        )
