"""Client of the admin routes of a running server, for `fgm-service models`."""

from typing import Any, Self
from urllib.parse import quote

import httpx2

from service.errors import StartError
from service.schemas import LoadedModel, LoadedModels

LOADING_SECONDS = 1800.0  # that a server may need to load a model, or to answer the accepted requests of one


class RemoteServer:
    """Client of a server at `url`, with an API key if it requires one; `with` closes the connection.

    Every method raises StartError with the server's error, or if it cannot be reached.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        timeout = httpx2.Timeout(LOADING_SECONDS, connect=5)
        try:
            self._http = httpx2.Client(base_url=f"{url.rstrip('/')}/v1/admin/", headers=headers, timeout=timeout)
        except httpx2.InvalidURL as error:
            raise StartError(f"{url} is no valid URL ({error}); write it as http://127.0.0.1:8000") from None
        self._url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> LoadedModels:
        """Return the loaded models, and the folders that can be loaded."""
        return LoadedModels.model_validate(self._request("GET", "models"))

    def load(self, folder: str, name: str | None) -> LoadedModel:
        """Load a student, under its own name if none is given."""
        return LoadedModel.model_validate(self._request("POST", "models", json={"folder": folder, "name": name}))

    def unload(self, name: str) -> None:
        self._request("DELETE", f"models/{quote(name, safe='')}")

    def load_adapter(self, model: str, folder: str, name: str) -> LoadedModel:
        given = {"model": model, "folder": folder, "name": name}
        return LoadedModel.model_validate(self._request("POST", "adapters", json=given))

    def unload_adapter(self, model: str, name: str) -> None:
        self._request("DELETE", f"adapters/{quote(name, safe='')}", params={"model": model})

    def _request(self, method: str, path: str, **content: Any) -> Any:
        try:
            response = self._http.request(method, path, **content)
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
