"""The same server over many GPUs and machines: Ray Serve starts replicas, routes requests to them, and scales.

A replica is the whole server: the app, its engine, its worker processes. A request stays in the replica that it was
routed to; between Ray's processes go settings, metrics, and the bytes of HTTP messages.
"""

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from pydantic import SecretStr
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.app import create_app
from service.engine.catalog import ModelCatalog
from service.engine.engine import Engine
from service.engine.launch import worker_processes
from service.engine.worker_handle import PIXEL_SLOTS
from service.errors import StartError
from service.observability.logs import configure
from service.settings import Settings
from service.signals import handled_signals
from service.temporary_folders import temporary_folder

log = logging.getLogger(__name__)

NAME = "fgm-service"  # of the application in Ray Serve
OTHERS = 100  # requests beside those for images that a replica takes at once: health, models, linked images


@dataclass(frozen=True)
class Scale:
    """The number of replicas, their cores, and when that number changes."""

    least: int = 1
    most: int = 1
    cpus: float = 1.0  # cores that Ray counts for each
    target_queue_seconds: float = 2.0  # seconds in which the replicas should work off their queues
    scale_up_seconds: float = 30.0  # of sustained load before replicas are added
    scale_down_seconds: float = 600.0  # of sustained lack of load before some are removed


class ReplicaMiddleware:
    """Outermost layer of a replica. It names the replica in responses, and reports to Ray what requests had loaded.

    Ray sends requests with the header `serve-multiplexed-model-id` to a replica that reported its value.
    """

    def __init__(self, app: ASGIApp, name: str, catalog: ModelCatalog, limit: int) -> None:
        async def loaded(model_id: str) -> str:  # Ray stores its own list of ids on the function
            return model_id

        self._app = app
        self._name = name
        self._catalog = catalog
        self._report = serve.multiplexed(loaded, max_num_models_per_replica=limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-replica"] = self._name
            await send(message)

        await self._app(scope, receive, named)
        if scope["type"] != "lifespan" and (model_id := serve.get_multiplexed_model_id()) in self._catalog.on_demand:
            await self._report(model_id)


class Replica:
    """A replica, in a process of its own. Ray Serve ends the app's lifespan when it removes the replica."""

    def __init__(self, options: dict[str, Any]) -> None:
        """`options` are all settings by name. Raises StartError when the workers cannot start."""
        settings = Settings(**options)
        configure(settings.observability.log_format, settings.observability.log_level)
        pool = worker_processes(settings)
        pool.start()  # before the app does, so that Ray reports what is wrong
        self._app = create_app(settings, pool)
        self._engine: Engine = self._app.state.engine
        self._app.add_middleware(
            ReplicaMiddleware,
            name=serve.get_replica_context().replica_tag,
            catalog=self._engine.catalog,
            limit=max(1, settings.engine.on_demand_students + settings.engine.on_demand_adapters),
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Metrics for `ByQueueSeconds`; Ray asks every few seconds and averages them."""
        return {"busy": self._engine.dispatcher.busy, "queue_seconds": self._engine.dispatcher.queue_seconds}


def run(settings: Settings, scale: Scale, address: str) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was accepted. Raises StartError.

    `address` is a Ray cluster's, `auto` the one that this machine belongs to, and `local` starts Ray on this machine
    for as long as the server runs.
    """
    local = address == "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with contextlib.ExitStack() as stack:
        try:
            if local:
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray leaves one in the home folder
                ray.init(address, include_dashboard=False)
            else:
                ray.init(address)
        except Exception as error:  # Ray raises plain ones; its own processes get half a minute to start
            raise StartError(f"Ray does not start, or is not found at {address}: {error}") from error
        stack.callback(ray.shutdown)
        folder = settings.images.artifacts or stack.enter_context(temporary_folder("fgm-artifacts-"))
        application = _application(_shared(settings, folder), scale)
        stopped = threading.Event()
        for number in handled_signals():
            signal.signal(number, lambda *_: stopped.set())
        _start_proxies(settings)
        try:
            _deploy(application)
            log.info("waiting for replicas")
            while not _serving() and not stopped.wait(0.2):
                pass
            if not stopped.is_set():
                log.info("serving on http://%s:%d", settings.http.host, settings.http.port)
            stopped.wait()
        finally:
            serve.delete(NAME, _blocking=False)
            while NAME in serve.status().applications:  # replicas answer what they took
                time.sleep(0.1)
            if local:
                serve.shutdown()


def _start_proxies(settings: Settings) -> None:
    """Have a proxy of Ray's listen on each machine. Ray waits a minute for them, which is too short for a busy one."""
    options = {
        "host": settings.http.host,
        "port": settings.http.port,
        "keep_alive_timeout_s": settings.http.keep_alive_seconds,
    }
    try:
        serve.start(http_options=options, proxy_location="EveryNode")
    except TimeoutError:
        log.warning("Ray's proxies are not there after a minute; they are waited for")
        serve.start(http_options=options, proxy_location="EveryNode")  # finds what is starting


def _deploy(application: Any) -> None:
    """Have Ray start replicas, without waiting: there may be no GPU for the last one yet."""
    target = serve.RunTarget(application, NAME, "/")
    with contextlib.suppress(TimeoutError):  # of the proxies, which `_serving` looks at
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _serving() -> bool:
    """Whether requests are answered. Raises StartError when they cannot be."""
    status = serve.status()
    application = status.applications[NAME]
    if application.status == "DEPLOY_FAILED":
        raise StartError(_reason(application.message))
    return application.status == "RUNNING" and all(proxy == "HEALTHY" for proxy in status.proxies.values())


def _application(settings: Settings, scale: Scale) -> Any:
    """The deployment, bound to its settings."""
    engine = settings.engine
    device = engine.devices
    if device == "auto":
        device = "cuda:0" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
    # The maximum in the engine: interactive and bulk work may each fill the queue.
    images = 2 * engine.max_queued_images + PIXEL_SLOTS * engine.max_batch * engine.workers_per_device
    deployment = serve.deployment(
        name="server",
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": int(device == "cuda:0")},
        # The engine's own bound is met first: its refusals say how long to wait.
        max_ongoing_requests=images + OTHERS,
        max_queued_requests=engine.max_queued_images,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        autoscaling_config={
            "min_replicas": scale.least,
            "max_replicas": scale.most,
            "upscale_delay_s": scale.scale_up_seconds,
            "downscale_delay_s": scale.scale_down_seconds,
            "policy": {
                "policy_function": "service.ray.autoscaling.ByQueueSeconds",
                "policy_kwargs": {"target_queue_seconds": scale.target_queue_seconds},
            },
        },
        graceful_shutdown_timeout_s=settings.http.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=1,
    )
    options = dict(settings.model_copy(update={"engine": engine.model_copy(update={"devices": device})}))
    return deployment(serve.ingress()(Replica)).bind(options)


def _shared(settings: Settings, artifacts: str) -> Settings:
    """Settings for all replicas: one store of linked images, one secret, and no data folder without a database.

    Replicas measure nothing at their start: each would choose for itself, and a seed's bits would differ between them.
    """
    secret = settings.images.artifact_secret or SecretStr(secrets.token_hex(32))
    images = settings.images.model_copy(update={"artifacts": artifacts, "artifact_secret": secret})
    data = settings.data
    if settings.jobs.database is None:
        data = None
        log.info("without a PostgreSQL database for all replicas there are no files, batches and jobs")
    engine = settings.engine.model_copy(update={"tuning_seconds": 0.0})
    return settings.model_copy(update={"images": images, "data": data, "engine": engine})


def _reason(report: str) -> str:
    """The replica's own sentence, where Ray's report holds one."""
    lines = [line for line in report.splitlines() if line.startswith("service.errors.StartError: ")]
    return lines[-1].partition(": ")[2] if lines else f"Ray could not start the replicas: {report}"
