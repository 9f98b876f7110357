"""`create_app(settings)`: the whole composition on one screen."""

import importlib
import pkgutil
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI

from service import __doc__ as summary
from service import handlers, routers
from service.engine.engine import Engine
from service.engine.launch import Fleet, processes
from service.metrics import Metrics
from service.middleware import Front
from service.settings import Settings
from service.state import State


def create_app(settings: Settings | None = None, fleet: Fleet | None = None) -> FastAPI:
    """The server. `fleet` are its workers, those of the settings if none is given; they start with the app."""
    settings = settings or Settings()
    metrics = Metrics()
    engine = Engine(fleet or processes(settings), settings, metrics)
    encoders = ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="encode")
    state = State(settings, metrics, encoders, engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.drain()
        encoders.shutdown()

    app = FastAPI(title="One-step text-to-image", description=summary or "", version="1", lifespan=lifespan)
    app.state.service = state
    for module in pkgutil.iter_modules(routers.__path__):
        app.include_router(importlib.import_module(f"service.routers.{module.name}").router)
    app.add_middleware(Front, metrics=metrics, max_body_bytes=settings.max_body_bytes)
    handlers.install(app)
    return app
