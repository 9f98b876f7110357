"""`create_app(settings)`: the whole composition on one screen."""

import asyncio
import importlib
import pkgutil
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI

from service import __doc__ as summary
from service import handlers, routers
from service.engine.backend import Backend
from service.engine.engine import Engine
from service.metrics import Metrics
from service.middleware import Front
from service.settings import Settings
from service.state import State


def load_backends(settings: Settings) -> Mapping[str, Backend]:
    """The registry's; imported when it is needed, since it brings torch."""
    from service import registry

    return registry.load_backends(settings)


def create_app(
    settings: Settings | None = None, load: Callable[[Settings], Mapping[str, Backend]] = load_backends
) -> FastAPI:
    """The server. `load` makes the backends when the app starts; simulations and tests bring their own."""
    settings = settings or Settings()
    metrics = Metrics()
    state = State(settings, metrics, ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="encode"))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.backends = await asyncio.to_thread(load, settings)
        engine = Engine(state.backends, settings.max_batch, settings.queue_limit, metrics)
        await engine.warm_up()
        state.engine = engine
        yield
        state.engine = None
        await engine.drain()
        state.encoders.shutdown()

    app = FastAPI(title="One-step text-to-image", description=summary or "", version="1", lifespan=lifespan)
    app.state.service = state
    for module in pkgutil.iter_modules(routers.__path__):
        app.include_router(importlib.import_module(f"service.routers.{module.name}").router)
    app.add_middleware(Front, metrics=metrics, max_body_bytes=settings.max_body_bytes)
    handlers.install(app)
    return app
