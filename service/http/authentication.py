"""API keys of requests and realtime sessions, and the checks of a server without keys."""

from fastapi.requests import HTTPConnection

from service.errors import Forbidden, Unauthorized
from service.http.keys import ApiKey, KeyFile, KeyReader, Scope, find
from service.http.origins import check_open
from service.settings import Settings


class Authenticator:
    """Checks the keys of the settings and of the key file. A key file that is set guards the server even if empty."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._keys = tuple(ApiKey.of_settings(key.get_secret_value()) for key in settings.http.api_keys)
        self._reader = KeyReader(KeyFile(settings.http.keys_file)) if settings.http.keys_file else None

    async def owner(self, token: str, scope: Scope, connection: HTTPConnection) -> str:
        """Return the name of the key's owner. On a server without keys, it is the client's address.

        Raises Unauthorized for an unknown key, Forbidden for a key without the scope or, on a server without keys, a
        page of another origin, and Unavailable while the keys cannot be read.
        """
        if not self._keys and self._reader is None:
            check_open(connection.headers.get("origin"), connection.headers.get("host", ""), self._settings)
            return connection.client.host if connection.client else "local"
        from_file = await self._reader.read() if self._reader else ()
        key = find((*self._keys, *from_file), token)
        if key is None:
            message = "a valid API key is needed, as `Authorization: Bearer KEY`, `api-key: KEY` or `x-api-key: KEY`"
            raise Unauthorized(message, code="invalid_api_key")
        if scope not in key.scopes:
            raise Forbidden(f"this API key has no scope {scope!r}", code="insufficient_scope")
        return key.owner
