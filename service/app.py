"""`create_app(settings)`: the whole composition on one screen."""

import asyncio
import contextlib
import importlib
import logging
import pkgutil
import secrets
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from service import __doc__ as summary
from service import routers
from service.engine.engine import Engine
from service.engine.launch import WorkerPool, worker_processes
from service.engine.loaded_models import LoadedModelStore
from service.errors import StartError, Unavailable
from service.http import error_handlers
from service.http.idempotency import IdempotencyStore
from service.http.middleware import BodyLimit, CorsMiddleware, RequestMiddleware
from service.http.origins import pattern
from service.http.rate_limiter import RateLimiter
from service.images.artifacts import Artifacts
from service.images.provenance import signer
from service.images.safety import checker
from service.jobs.batches.workflow import BatchWorkflow
from service.jobs.jobs import Jobs
from service.observability.metrics import Metrics
from service.settings import Settings
from service.state import State

if TYPE_CHECKING:
    from service.observability.tracing import Tracing

log = logging.getLogger(__name__)
EXPOSED = [
    "x-request-id",
    "server-timing",
    "retry-after",
    "retry-after-ms",
    "x-queue-position",
    "x-seed",
    "x-warning",
    "idempotent-replayed",
]
FORM_BYTES = 64 << 10  # what an upload has besides its file
ARTIFACT_THREADS = 32  # they only wait for a disk or a network


def create_app(
    settings: Settings | None = None, pool: WorkerPool | None = None, tracing: "Tracing | None" = None
) -> FastAPI:
    """The server. `pool` are its workers, which start with the app; `tracing` is where its spans go.

    Both are those of the settings if none are given.
    """
    settings = settings or Settings()
    check, sign = checker(settings.safety), signer(settings)  # first, for they may refuse the settings
    tracing = tracing or _tracing(settings)
    metrics = Metrics()
    engine = Engine(pool or worker_processes(settings), settings, metrics, tracing)
    jobs = Jobs(settings.data, settings) if settings.data else None
    links = settings.artifacts or (str(jobs.folder / "artifacts") if jobs else None)
    folder = None if links else tempfile.TemporaryDirectory(prefix="fgm-artifacts-")
    given = settings.artifact_secret
    drawn = jobs.secret() if jobs else secrets.token_bytes(32)
    secret = given.get_secret_value().encode() if given else drawn
    state = State(
        settings,
        metrics,
        ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="encode"),
        engine,
        Artifacts(folder.name if folder else links or "", secret, settings.artifact_seconds),
        ThreadPoolExecutor(ARTIFACT_THREADS, thread_name_prefix="artifacts"),
        IdempotencyStore(settings.replay_seconds, settings.replay_bytes),
        RateLimiter(settings.rate_limit, metrics),
        check,
        sign,
        jobs,
        tracing,
        LoadedModelStore(jobs.folder if jobs else None),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        await engine.start()
        await state.loaded_models.restore(engine, settings.students)
        settings.check_aliases(engine.models)
        if jobs:
            BatchWorkflow(state, jobs, asyncio.get_running_loop())
            await asyncio.to_thread(jobs.start)
            await jobs.students.start(engine)
        retrying = asyncio.create_task(state.loaded_models.retry(engine, settings.students))
        sweeping = asyncio.create_task(_sweep(state, max(60, settings.artifact_seconds / 10)))
        yield {"metrics": metrics}  # for the protocol, which refuses what never reaches the app
        retrying.cancel()
        await asyncio.wait([retrying])
        if jobs:
            await jobs.students.stop()
            await asyncio.to_thread(jobs.stop)
        await engine.drain()
        state.encoders.shutdown()
        if tracing:
            await asyncio.to_thread(tracing.close)
        sweeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sweeping
        state.artifact_threads.shutdown(wait=False, cancel_futures=True)
        if folder:
            folder.cleanup()

    app = FastAPI(
        title="One-step text-to-image",
        description=summary or "",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # RequestMiddleware serves both forms of a path
    )
    app.state.service = state
    for module in pkgutil.iter_modules(routers.__path__):
        app.include_router(importlib.import_module(f"service.routers.{module.name}").router)
    upload = BodyLimit(settings.max_file_bytes + FORM_BYTES, settings.upload_seconds)
    body = BodyLimit(settings.max_body_bytes, settings.body_seconds)
    app.add_middleware(RequestMiddleware, metrics, body, {"/v1/files": upload} if jobs else {}, tracing)
    if settings.cors_origins:
        app.add_middleware(
            CorsMiddleware,
            allow_origins=settings.cors_origins,
            allow_origin_regex="|".join(map(pattern, settings.cors_origins)),
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],  # OpenAI's client sends some of its own; what opens a door is the key, not a header
            expose_headers=EXPOSED,
        )
    trusted = "*" if "*" in settings.trusted_proxies else list(settings.trusted_proxies)
    app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=trusted)
    error_handlers.install(app)
    return app


def _tracing(settings: Settings) -> "Tracing | None":
    """What the settings ask for. Raises StartError when the SDK is missing."""
    if settings.otlp_endpoint is None:
        return None
    try:
        from service.observability.tracing import Tracing
    except ImportError:
        raise StartError("otlp_endpoint: the OpenTelemetry SDK is not installed; pip install '.[tracing]'") from None
    return Tracing.to(settings.otlp_endpoint)


async def _sweep(state: State, period: float) -> None:
    """Delete expired images periodically. If the store does not answer, the next period tries again."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            await loop.run_in_executor(state.artifact_threads, state.artifacts.sweep, time.time())
        except Unavailable:
            log.warning("expired images are left for the next time")
        await asyncio.sleep(period)
