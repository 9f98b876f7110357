"""`/healthz`, `/readyz`, `/metrics` and `/version`: for orchestrators and dashboards, without an API key."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.errors import Unavailable
from service.http.dependencies import MetricsDep, UncheckedEngineDep
from service.version import NAME, VERSION

router = APIRouter(tags=["operations"])


@router.get("/healthz")
async def alive() -> dict[str, str]:
    """Liveness: the process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def ready(engine: UncheckedEngineDep) -> dict[str, str]:
    """Readiness: a worker has run its models once and takes requests; 503 otherwise."""
    if not engine.ready:
        raise Unavailable("the server is starting or shutting down, or its workers are being replaced")
    return {"status": "ready"}


@router.get("/version")
async def show_version() -> dict[str, str]:
    """Name and version of the server's package."""
    return {"name": NAME, "version": VERSION}


@router.get("/metrics", response_class=Response)
async def show_metrics(metrics: MetricsDep) -> Response:
    """Metrics in the Prometheus text format."""
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
