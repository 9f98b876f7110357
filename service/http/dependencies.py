"""What handlers need, as named types. All dependencies are coroutines, because FastAPI runs others in a thread."""

from typing import Annotated, Any, NamedTuple

from fastapi import Depends, Request
from fastapi.requests import HTTPConnection
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from service.engine.engine import Engine
from service.engine.stored_models import StoredModels
from service.errors import NotFound, Unavailable
from service.http.authentication import Authenticator
from service.http.idempotency import IdempotencyStore
from service.http.keys import Scope
from service.http.rate_limiter import RateLimiter
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
AuthenticatorDep = Annotated[Authenticator, _from_app("authenticator")]


async def _engine(engine: UncheckedEngineDep) -> Engine:
    engine.check_open()
    return engine


EngineDep = Annotated[Engine, Depends(_engine)]


class ImageServices(NamedTuple):
    """What the route of images needs. It is one dependency, because each one costs time in every request."""

    images: ImageService
    settings: Settings
    rate_limiter: RateLimiter
    idempotency: IdempotencyStore


async def _image_services(connection: HTTPConnection) -> ImageServices:
    """Return the app's objects. Raises Unavailable while the engine starts or drains."""
    state = connection.app.state
    state.engine.check_open()
    return ImageServices(state.images, state.settings, state.rate_limiter, state.idempotency)


ImageServicesDep = Annotated[ImageServices, Depends(_image_services)]


async def _jobs(jobs: Annotated[Jobs | None, _from_app("jobs")]) -> Jobs:
    if jobs is None:
        raise NotFound("this server keeps no files, batches or jobs; it needs a data folder", code="jobs_disabled")
    if not jobs.open:
        raise Unavailable("the server is starting or shutting down")
    return jobs


JobsDep = Annotated[Jobs, Depends(_jobs)]


def _owner_with(scope: Scope) -> Any:
    """Return a dependency: the owner of the caller's key with a scope, or its address on a server without keys.

    It raises Unauthorized without a known key, Forbidden if the key does not have the scope.
    """

    async def owner(
        request: Request,
        authenticator: AuthenticatorDep,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
        api_key: Annotated[str | None, Depends(APIKeyHeader(name="api-key", auto_error=False))],
        x_api_key: Annotated[str | None, Depends(APIKeyHeader(name="x-api-key", auto_error=False))],
    ) -> str:
        token = bearer.credentials if bearer else api_key or x_api_key or ""
        name = await authenticator.owner(token, scope, request)
        request.state.owner = name
        return name

    return Depends(owner)


ImagesOwner = Annotated[str, _owner_with("generate")]
JobsOwner = Annotated[str, _owner_with("jobs")]
AdminOwner = Annotated[str, _owner_with("admin")]
