"""The models of a running server: what `fgm-service models` asks of its admin routes."""

from typing import Any, Self
from urllib.parse import quote

import httpx2

from service.errors import StartError
from service.schemas import LoadedModel, LoadedModels

LOADING_SECONDS = 1800.0  # that a server may take to read a model, or to finish what it has accepted for one


class RemoteServer:
    """A server at `url`, asked with an API key where it wants one; `with` closes the connection.

    Every method raises StartError with what the server says, or when it cannot be reached.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        timeout = httpx2.Timeout(LOADING_SECONDS, connect=5)
        try:
            self._http = httpx2.Client(base_url=f"{url.rstrip('/')}/v1/admin/", headers=headers, timeout=timeout)
        except httpx2.InvalidURL as error:
            raise StartError(f"{url} is no address of a server ({error}); write it as http://127.0.0.1:8000") from None
        self._url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> LoadedModels:
        """What is served, and what may be loaded."""
        return LoadedModels.model_validate(self._ask("GET", "models"))

    def load(self, folder: str, name: str | None) -> LoadedModel:
        """Load a student, by its own name if none is given."""
        return LoadedModel.model_validate(self._ask("POST", "models", json={"folder": folder, "name": name}))

    def unload(self, name: str) -> None:
        """Unload a student."""
        self._ask("DELETE", f"models/{quote(name, safe='')}")

    def load_adapter(self, model: str, folder: str, name: str) -> LoadedModel:
        """Load a LoRA adapter for a student."""
        given = {"model": model, "folder": folder, "name": name}
        return LoadedModel.model_validate(self._ask("POST", "adapters", json=given))

    def unload_adapter(self, model: str, name: str) -> None:
        """Take an adapter from a student."""
        self._ask("DELETE", f"adapters/{quote(name, safe='')}", params={"model": model})

    def _ask(self, method: str, path: str, **content: Any) -> Any:
        try:
            answer = self._http.request(method, path, **content)
            said = answer.json()
            if answer.is_success:
                return said
            reason = said["error"]["message"]
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise StartError(f"{self._url} does not answer ({error}); is a server there? --url names another") from None
        except (ValueError, LookupError, TypeError, RecursionError):
            raise StartError(f"{self._url} answers, but not as this server does; --url names another") from None
        hint = "; --key names a key of the scope admin" if answer.status_code in (401, 403) else ""
        raise StartError(f"{self._url} refuses: {reason}{hint}")
