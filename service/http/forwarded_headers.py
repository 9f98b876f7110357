"""The headers in which a proxy names the caller's address and scheme."""

from typing import Any

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware


class ForwardedHeaders(ProxyHeadersMiddleware):
    """Uvicorn's middleware, which knows only one scheme in lower case.

    Schemes may have capitals (RFC 3986, 3.1). Of the schemes of several proxies, the first is the caller's.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = scope.get("headers", ())
        scope = {**scope, "headers": [(name, _scheme(name, value)) for name, value in headers]}
        await super().__call__(scope, receive, send)


def _scheme(name: bytes, value: bytes) -> bytes:
    return value.partition(b",")[0].strip().lower() if name == b"x-forwarded-proto" else value
