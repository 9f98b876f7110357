"""What handlers need, as named types. All dependencies are coroutines, because FastAPI runs others in a thread."""

from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.requests import HTTPConnection
from fastapi.security import APIKeyHeader, HTTPBearer

from service.engine.engine import Engine
from service.engine.stored_models import StoredModels
from service.errors import NotFound, Unavailable
from service.http.authentication import Authenticator
from service.http.keys import Scope
from service.images.realtime import RealtimeSessions
from service.images.service import ImageService
from service.jobs.jobs import Jobs
from service.observability.metrics import Metrics
from service.settings import Settings


def _from_app(name: str) -> Any:
    """Return a dependency on an attribute of the app's state, which `create_app` sets."""

    async def attribute(connection: HTTPConnection) -> Any:
        return getattr(connection.app.state, name)

    return Depends(attribute)


SettingsDep = Annotated[Settings, _from_app("settings")]
MetricsDep = Annotated[Metrics, _from_app("metrics")]
UncheckedEngineDep = Annotated[Engine, _from_app("engine")]  # also while it starts or drains
ImagesDep = Annotated[ImageService, _from_app("images")]
RealtimeDep = Annotated[RealtimeSessions, _from_app("realtime")]
StoredModelsDep = Annotated[StoredModels, _from_app("stored_models")]


async def _engine(engine: UncheckedEngineDep) -> Engine:
    engine.check_open()
    return engine


EngineDep = Annotated[Engine, Depends(_engine)]


async def _jobs(jobs: Annotated[Jobs | None, _from_app("jobs")]) -> Jobs:
    if jobs is None:
        raise NotFound("this server keeps no files, batches or jobs; it needs a data folder", code="jobs_disabled")
    if not jobs.open:
        raise Unavailable("the server is starting or shutting down")
    return jobs


JobsDep = Annotated[Jobs, Depends(_jobs)]


_BEARER = HTTPBearer(auto_error=False)
_API_KEY = APIKeyHeader(name="api-key", auto_error=False)
_X_API_KEY = APIKeyHeader(name="x-api-key", auto_error=False)


async def owner_of(request: Request, scope: Scope) -> str:
    """Return the owner of the caller's key with a scope, or its address on a server without keys.

    Raises Unauthorized without a known key, Forbidden if the key does not have the scope.
    """
    bearer = await _BEARER(request)
    token = bearer.credentials if bearer else await _API_KEY(request) or await _X_API_KEY(request) or ""
    authenticator: Authenticator = request.app.state.authenticator
    name = await authenticator.owner(token, scope, request)
    request.state.owner = name
    return name


def _owner_with(scope: Scope) -> Any:
    """Return `owner_of` as a dependency, whose other parameters are for the OpenAPI description."""

    async def owner(
        request: Request,
        _bearer: Annotated[Any, Depends(_BEARER)],
        _api_key: Annotated[Any, Depends(_API_KEY)],
        _x_api_key: Annotated[Any, Depends(_X_API_KEY)],
    ) -> str:
        return await owner_of(request, scope)

    return Depends(owner)


ImagesOwner = Annotated[str, _owner_with("generate")]
JobsOwner = Annotated[str, _owner_with("jobs")]
AdminOwner = Annotated[str, _owner_with("admin")]
