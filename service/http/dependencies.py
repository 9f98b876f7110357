"""What handlers ask for, as named types. All are coroutines: FastAPI gives anything else to a thread, each time."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.requests import HTTPConnection
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from service.engine.engine import Engine
from service.errors import Forbidden, NotFound, Unauthorized, Unavailable
from service.http.keys import Scope, find
from service.http.origins import check_open
from service.jobs.jobs import Jobs
from service.state import State


async def _service(connection: HTTPConnection) -> State:
    state: State = connection.app.state.service
    return state


Service = Annotated[State, Depends(_service)]


async def _running(service: Service) -> Engine:
    service.engine.check_open()
    return service.engine


EngineDep = Annotated[Engine, Depends(_running)]


async def _kept(service: Service) -> Jobs:
    if service.jobs is None:
        raise NotFound("this server keeps no files, batches or jobs; it needs a data folder", code="jobs_disabled")
    if not service.jobs.open:
        raise Unavailable("the server is starting or shutting down")
    return service.jobs


JobsDep = Annotated[Jobs, Depends(_kept)]


@dataclass(frozen=True)
class Caller:
    """Who asks. `owner` is the name of the key, or the address where the server asks for none."""

    owner: str


class Needs:
    """A dependency that lets callers with a scope in; a server without keys lets in everyone."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    async def __call__(
        self,
        request: Request,
        service: Service,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
        api_key: Annotated[str | None, Depends(APIKeyHeader(name="api-key", auto_error=False))],
        x_api_key: Annotated[str | None, Depends(APIKeyHeader(name="x-api-key", auto_error=False))],
    ) -> Caller:
        """Raises Unauthorized without a known key, Forbidden where the key is not for this."""
        token = bearer.credentials if bearer else api_key or x_api_key or ""
        caller = Caller(await owner_of(service, token, self._scope, request))
        request.state.owner = caller.owner
        return caller


async def owner_of(service: State, token: str, scope: Scope, connection: HTTPConnection) -> str:
    """Whose token it is. Raises Unauthorized for one that is not known, Forbidden where it is not for this.

    Raises Unavailable while keys cannot be read. Without keys, it is the address of whoever calls; raises Forbidden
    for a page from elsewhere.
    """
    if not service.guarded:
        check_open(connection.headers.get("origin"), connection.headers.get("host", ""), service.settings)
        return connection.client.host if connection.client else "local"
    key = find(await service.keys(), token)
    if key is None:
        message = "a valid API key is needed, as `Authorization: Bearer KEY`, `api-key: KEY` or `x-api-key: KEY`"
        raise Unauthorized(message, code="invalid_api_key")
    if scope not in key.scopes:
        raise Forbidden(f"this API key has no scope {scope!r}", code="insufficient_scope")
    return key.owner


ImagesCaller = Annotated[Caller, Depends(Needs("generate"))]
JobsCaller = Annotated[Caller, Depends(Needs("jobs"))]
AdminCaller = Annotated[Caller, Depends(Needs("admin"))]


async def bring(caller: ImagesCaller) -> None:
    """Load what a request names in its headers, for as long as it lasts: nothing, but under Ray (service.cluster)."""


Brought = Annotated[None, Depends(bring)]
