"""`create_app(settings)`: the whole composition on one screen."""

import asyncio
import importlib
import logging
import pkgutil
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service import __doc__ as summary
from service import errors, routers
from service.engine.backend import Backend
from service.engine.engine import Engine
from service.metrics import Metrics
from service.middleware import Front
from service.settings import Settings

log = logging.getLogger(__name__)


@dataclass
class State:
    """What the handlers share; `ready` once the real path has run."""

    settings: Settings
    metrics: Metrics
    encoders: ThreadPoolExecutor
    backends: Mapping[str, Backend] = field(default_factory=dict)
    engine: Engine | None = None
    ready: bool = False


def load_backends(settings: Settings) -> Mapping[str, Backend]:
    """The registry's; imported when it is needed, since it brings torch."""
    from service import registry

    return registry.load_backends(settings)


def create_app(
    settings: Settings | None = None, load: Callable[[Settings], Mapping[str, Backend]] = load_backends
) -> FastAPI:
    """The server. `load` makes the backends when the app starts, so that tests and simulations may bring their own."""
    settings = settings or Settings()
    metrics = Metrics()
    state = State(settings, metrics, ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="encode"))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.backends = await asyncio.to_thread(load, settings)
        state.engine = Engine(state.backends, settings.max_batch, settings.queue_limit, metrics)
        await state.engine.warm_up()
        state.ready = True
        yield
        state.ready = False
        await state.engine.drain()
        state.encoders.shutdown()

    app = FastAPI(title="One-step text-to-image", description=summary or "", version="1", lifespan=lifespan)
    app.state.service = state
    for module in pkgutil.iter_modules(routers.__path__):
        app.include_router(importlib.import_module(f"service.routers.{module.name}").router)
    app.add_middleware(Front, metrics=metrics, max_body_bytes=settings.max_body_bytes)
    app.add_exception_handler(errors.ServiceError, _answer)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_bug)
    return app


async def _answer(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.ServiceError)
    status, body, headers = errors.to_openai(error)
    return JSONResponse(body, status, headers)


async def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    """The first of FastAPI's complaints, with the field as `param`."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return await _answer(request, errors.InvalidRequest("the body is not JSON", code="invalid_json"))
    param = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        return await _answer(
            request, errors.InvalidRequest(f"{param} is not supported", param, "unknown_parameter")
        )
    return await _answer(
        request, errors.InvalidRequest(f"{param or 'body'}: {first['msg']}", param, "invalid_value")
    )


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return await _answer(
            request, errors.MethodNotAllowed(f"{request.method} is not allowed on {request.url.path}")
        )
    if error.status_code == 404:
        return await _answer(request, errors.NotFound(f"there is no {request.url.path}"))
    return await _answer(request, errors.InvalidRequest(str(error.detail)))


async def _answer_bug(request: Request, error: Exception) -> JSONResponse:
    """Starlette logs the traceback; the client is told nothing of it."""
    return await _answer(
        request, errors.ServiceError("something went wrong here; the server's log says what")
    )
