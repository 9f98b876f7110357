"""What handlers ask for, as named types."""

import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.engine.engine import Engine
from service.errors import Unauthorized, Unavailable
from service.state import State


def _service(request: Request) -> State:
    state: State = request.app.state.service
    return state


Service = Annotated[State, Depends(_service)]


def _running(service: Service) -> Engine:
    if not service.engine.open:
        raise Unavailable("the server is starting or shutting down")
    return service.engine


Running = Annotated[Engine, Depends(_running)]


def require_key(
    service: Service, given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
) -> None:
    """Refuse a request without one of the server's keys; a server without keys is open."""
    keys = service.settings.api_keys
    if not keys:
        return
    token = given.credentials.encode() if given else b""
    # Every key is compared, each in constant time, so that time tells nothing about any of them.
    if not sum(hmac.compare_digest(token, key.get_secret_value().encode()) for key in keys):
        raise Unauthorized("a valid API key is needed, as `Authorization: Bearer KEY`", code="invalid_api_key")
