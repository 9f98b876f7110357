"""`create_app(settings)`: the whole composition on one screen."""

import asyncio
import importlib
import logging
import pkgutil
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.datastructures import State

from service import __doc__ as summary
from service import routers
from service.engine.engine import Engine
from service.engine.launch import WorkerPool, worker_processes
from service.engine.stored_models import StoredModels
from service.errors import StartError
from service.http import error_handlers
from service.http.authentication import Authenticator
from service.http.daemon_thread import in_daemon_thread
from service.http.forwarded_headers import ForwardedHeaders
from service.http.idempotency import IDEMPOTENCY_SECONDS, IdempotencyStore
from service.http.middleware import BODY_SECONDS, BodyLimit, CorsMiddleware, RequestMiddleware
from service.http.origins import pattern
from service.http.rate_limiter import RateLimiter
from service.images.artifacts import ArtifactStore
from service.images.provenance import load_signer
from service.images.realtime import RealtimeSessions
from service.images.safety import load_checker
from service.images.service import ImageService
from service.jobs.batches.workflow import BatchWorkflow
from service.jobs.jobs import Jobs
from service.observability.metrics import Metrics
from service.settings import Settings

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
FORM_BYTES = 64 << 10  # of an upload besides its file
JOBS_SECONDS = 30.0  # that a shutdown waits for batches and jobs, which may themselves wait for the database


def create_app(
    settings: Settings | None = None, pool: WorkerPool | None = None, tracing: "Tracing | None" = None
) -> FastAPI:
    """Return the server's app. `pool` are the workers, which start with the app; `tracing` takes the spans.

    Both are by default those of the settings.
    """
    settings = settings or Settings()
    check, signer = (
        load_checker(settings.images.safety),
        load_signer(settings),
    )  # first, because they may reject the settings
    tracing = tracing or _tracing(settings)
    metrics = Metrics()
    engine = Engine(pool or worker_processes(settings), settings, metrics, tracing)
    jobs = Jobs(settings.data, settings) if settings.data else None
    artifacts = ArtifactStore(
        settings.images.artifacts or (str(jobs.folder / "artifacts") if jobs else None),
        _artifact_secret(settings, jobs),
        settings.images.artifact_link_seconds,
    )
    images = ImageService(engine, artifacts, check, signer, settings, metrics, tracing)
    stored_models = StoredModels(jobs.folder if jobs else None)
    rate_limiter = RateLimiter(settings.http.rate_limit, metrics)
    authenticator = Authenticator(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        await engine.start()
        await stored_models.restore(engine.catalog, settings.models_folder)
        settings.check_aliases(engine.catalog.models)
        if jobs:
            BatchWorkflow(images, jobs, settings, asyncio.get_running_loop())
            await asyncio.to_thread(jobs.start)
            await jobs.students.start(engine.catalog)
        retrying = asyncio.create_task(stored_models.retry(engine.catalog, settings.models_folder))
        sweeping = asyncio.create_task(artifacts.sweep_periodically())
        yield {"metrics": metrics}  # for the protocol, which rejects requests that never reach the app
        retrying.cancel()
        await asyncio.wait([retrying])
        if jobs:
            await jobs.students.stop()
            stopping = asyncio.wrap_future(in_daemon_thread(jobs.stop, "jobs-stop"))
            if not (await asyncio.wait([stopping], timeout=JOBS_SECONDS))[0]:
                log.warning("batches and jobs do not stop within %g s; they will be resumed", JOBS_SECONDS)
        await engine.drain()
        images.close()
        if tracing:
            await asyncio.to_thread(tracing.close)
        sweeping.cancel()
        await asyncio.wait([sweeping])
        artifacts.close()

    app = FastAPI(
        title="One-step text-to-image",
        description=summary or "",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts of other origins
        redoc_url=None,
        redirect_slashes=False,  # RequestMiddleware serves both forms of a path
    )
    app.state = State(  # for service.http.dependencies
        {
            "settings": settings,
            "metrics": metrics,
            "engine": engine,
            "images": images,
            "jobs": jobs,
            "stored_models": stored_models,
            "rate_limiter": rate_limiter,
            "authenticator": authenticator,
            "idempotency": IdempotencyStore(IDEMPOTENCY_SECONDS, settings.http.idempotency_cache_bytes),
            "realtime": RealtimeSessions(images, authenticator, rate_limiter, settings, metrics, tracing),
        }
    )
    names = sorted(
        (module.name for module in pkgutil.iter_modules(routers.__path__)), key=lambda name: name != "images"
    )
    for name in names:  # images first, because each request is compared with one route after the other
        app.include_router(importlib.import_module(f"service.routers.{name}").router)
    upload = BodyLimit(settings.jobs.max_file_bytes + FORM_BYTES, settings.jobs.upload_timeout_seconds)
    body = BodyLimit(settings.http.max_body_bytes, BODY_SECONDS)
    app.add_middleware(RequestMiddleware, metrics, body, {"/v1/files": upload} if jobs else {}, tracing)
    if settings.http.cors_origins:
        app.add_middleware(
            CorsMiddleware,
            allow_origins=settings.http.cors_origins,
            allow_origin_regex="|".join(map(pattern, settings.http.cors_origins)),
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],  # OpenAI's client sends its own; access is controlled by the key
            expose_headers=EXPOSED,
        )
    trusted = "*" if "*" in settings.http.trusted_proxies else list(settings.http.trusted_proxies)
    app.add_middleware(ForwardedHeaders, trusted_hosts=trusted)
    error_handlers.install(app)
    return app


def _tracing(settings: Settings) -> "Tracing | None":
    """Return the tracing of the settings, if any. Raises StartError if the SDK is missing."""
    if settings.observability.otlp_endpoint is None:
        return None
    try:
        from service.observability.tracing import Tracing
    except ImportError:
        raise StartError("otlp_endpoint: the OpenTelemetry SDK is not installed; pip install '.[tracing]'") from None
    return Tracing.to(settings.observability.otlp_endpoint)


def _artifact_secret(settings: Settings, jobs: Jobs | None) -> bytes:
    """Return the secret that signs links: that of the settings, of the data folder, or a random one."""
    if settings.images.artifact_secret:
        return settings.images.artifact_secret.get_secret_value().encode()
    return jobs.secret() if jobs else secrets.token_bytes(32)
