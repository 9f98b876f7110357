"""The same server over many GPUs and machines: Ray Serve starts replicas, routes requests to them, and scales.

A replica is the whole server: the app, its engine, its worker processes. A request stays in the replica that it was
routed to; between Ray's processes go settings, figures, and the bytes of HTTP messages.
"""

import contextlib
import logging
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import SecretStr
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.app import create_app
from service.dependencies import owner_of
from service.engine.engine import Engine
from service.engine.launch import processes
from service.engine.seat import SLOTS
from service.errors import ServiceError, StartError
from service.guest import Guest, Guests
from service.handlers import respond
from service.logs import configure
from service.settings import Settings
from service.state import State

log = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "cuda:0", "simulator")  # Ray gives each replica a GPU of its own, which it sees as the first
NAME = "fgm-service"  # of the application in Ray Serve
OTHERS = 100  # requests beside those for images that a replica takes at once: health, models, linked images


@dataclass(frozen=True)
class Scale:
    """How many replicas, of what, and when there are more or fewer."""

    least: int = 1
    most: int = 1
    cpus: float = 1.0  # cores that Ray counts for each
    patience: float = 2.0  # seconds in which the replicas should make what waits
    up_after: float = 30.0  # seconds for which more must be needed before more are started
    down_after: float = 600.0  # the same for fewer
    guests: int = 3  # students and adapters that a replica has loaded at once because requests asked for them


class Door:
    """What requests of a replica pass: what they ask for is loaded, their answer names the replica.

    They ask by the header that Ray routes by, to a replica that has it where there is one. The body may name
    another model or adapter; that one is served if it is loaded.
    """

    def __init__(self, app: FastAPI, name: str, guests: int) -> None:
        self._app = app
        self._name = name
        self._state: State = app.state.service
        self._guests = Guests(self._state.engine, self._state.settings.students)

        async def load(text: str) -> Guest:
            return await self._guests.load(text)

        self._guest: Callable[[str], Awaitable[Guest]] = serve.multiplexed(load, max_num_models_per_replica=guests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let an HTTP request through; anything else passes as it is."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-replica"] = self._name
            await send(message)

        try:
            guest = await self._asked(HTTPConnection(scope))
        except ServiceError as error:
            await respond(error)(scope, receive, named)
            return
        with guest.kept() if guest else contextlib.nullcontext():
            await self._app(scope, receive, named)

    async def _asked(self, request: HTTPConnection) -> Guest | None:
        """What a request asks for, loaded. Raises Unauthorized or Forbidden for one that may ask nothing."""
        text = serve.get_multiplexed_model_id()
        if not text or await self._guests.wish(text) is None:
            return None
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        owner_of(self._state, token, "generate", request)
        return await self._guest(text)


class Replica:
    """What Ray Serve calls of a replica, in a process of its own; it ends the app's lifespan when the replica goes."""

    def __init__(self, options: dict[str, Any], guests: int) -> None:
        """`options` are all settings by name. Raises StartError when the workers cannot start."""
        settings = Settings(**options)
        configure(settings.log_format, settings.log_level)
        fleet = processes(settings)
        fleet.start()  # before the app does, so that Ray reports what is wrong
        app = create_app(settings, fleet)
        self._engine: Engine = app.state.service.engine
        self._door = Door(app, serve.get_replica_context().replica_tag, guests)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._door

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Figures for `ByQueueSeconds`; Ray asks every few seconds and averages them."""
        return {"busy": self._engine.busy, "queue_seconds": self._engine.queue_seconds}


def run(settings: Settings, scale: Scale, address: str) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was accepted. Raises StartError.

    `address` is a Ray cluster's, `auto` the one that this machine belongs to, and `local` starts Ray on this machine
    for as long as the server runs.
    """
    if settings.devices not in DEVICES:
        raise StartError(f"devices: a replica has one, {', '.join(DEVICES)}, and not {settings.devices}")
    local = address == "local"
    if not local and settings.artefacts is None:
        raise StartError("artefacts: replicas on several machines need one store of linked images; name a folder")
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
        folder = settings.artefacts or stack.enter_context(tempfile.TemporaryDirectory(prefix="fgm-artefacts-"))
        application = _application(_shared(settings, folder), scale)
        stopped = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        _start_proxies(settings)
        try:
            serve.run(application, name=NAME, route_prefix="/")
            while not all(status == "HEALTHY" for status in serve.status().proxies.values()):
                time.sleep(0.1)
            log.info("serving on http://%s:%d", settings.host, settings.port)
            stopped.wait()
        except RuntimeError as error:
            raise StartError(_reason(error)) from None
        finally:
            serve.delete(NAME, _blocking=False)
            while NAME in serve.status().applications:  # replicas answer what they took
                time.sleep(0.1)
            if local:
                serve.shutdown()


def _start_proxies(settings: Settings) -> None:
    """Have a proxy of Ray's listen on each machine. Ray waits a minute for them, which is too short for a busy one."""
    options = {"host": settings.host, "port": settings.port}
    try:
        serve.start(http_options=options, proxy_location="EveryNode")
    except TimeoutError:
        log.warning("Ray's proxies are not there after a minute; they are waited for")
        serve.start(http_options=options, proxy_location="EveryNode")  # finds what is starting


def _application(settings: Settings, scale: Scale) -> Any:
    """The deployment, bound to its settings."""
    device = settings.devices
    if device == "auto":
        device = "cuda:0" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
    images = settings.queue_limit + SLOTS * settings.max_batch * settings.replicas  # in the engine, at most
    deployment = serve.deployment(
        name="server",
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": int(device == "cuda:0")},
        # The engine's own bound is met first: its refusals say how long to wait.
        max_ongoing_requests=images + OTHERS,
        max_queued_requests=settings.queue_limit,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        autoscaling_config={
            "min_replicas": scale.least,
            "max_replicas": scale.most,
            "upscale_delay_s": scale.up_after,
            "downscale_delay_s": scale.down_after,
            "policy": {
                "policy_function": "service.autoscaling.ByQueueSeconds",
                "policy_kwargs": {"patience": scale.patience},
            },
        },
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=1,
    )
    options = dict(settings.model_copy(update={"devices": device}))
    return deployment(serve.ingress()(Replica)).bind(options, scale.guests)


def _shared(settings: Settings, artefacts: str) -> Settings:
    """Settings that mean the same in every replica: one store of links, one secret, absolute paths, no own database."""
    paths: dict[str, Any] = {name: value.absolute() for name, value in settings if isinstance(value, Path)}
    if settings.database is None:
        paths["data"] = None
        log.info("without a PostgreSQL database for all replicas there are no files, batches and jobs")
    given = settings.artefact_secret or SecretStr(secrets.token_hex(32))
    paths["models"] = tuple(folder.absolute() for folder in settings.models)
    paths["artefacts"] = artefacts if "://" in artefacts else str(Path(artefacts).absolute())
    return settings.model_copy(update=paths | {"artefact_secret": given})


def _reason(error: RuntimeError) -> str:
    """The replica's own sentence, where Ray's report holds one."""
    lines = [line for line in str(error).splitlines() if line.startswith("service.errors.StartError: ")]
    return lines[-1].partition(": ")[2] if lines else f"Ray could not start the replicas: {error}"
