"""Client of the admin routes of a running server, for `fgm-service models`."""

from typing import Any, Self
from urllib.parse import quote

import httpx2

from service.errors import StartError

LOADING_SECONDS = 1800.0  # that a server may need to load a model, or to answer the accepted requests of one


class RemoteServer:
    """Client of a server at `url`, with an API key if it requires one; `with` closes the connection.

    Requests raise StartError with the server's error, or if it cannot be reached.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        timeout = httpx2.Timeout(LOADING_SECONDS, connect=5)
        try:
            self._http = httpx2.Client(base_url=f"{url.rstrip('/')}/v1/admin/", headers=headers, timeout=timeout)
        except httpx2.InvalidURL as error:
            raise StartError(f"{url} is not a valid URL ({error}); write it as http://127.0.0.1:8000") from None
        self._url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def request(self, method: str, *path: str, **content: Any) -> Any:
        """Return the JSON of an admin route, given by the parts of its path."""
        try:
            response = self._http.request(method, "/".join(quote(part, safe="") for part in path), **content)
            body = response.json()
            if response.is_success:
                return body
            reason = body["error"]["message"]
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise StartError(
                f"{self._url} does not respond ({error}); is a server running there? --url selects another"
            ) from None
        except (ValueError, LookupError, TypeError, RecursionError):
            raise StartError(f"{self._url} responds, but is not this server; --url selects another") from None
        hint = "; pass a key with the scope admin by --key" if response.status_code in (401, 403) else ""
        raise StartError(f"{self._url} refused: {reason}{hint}")
