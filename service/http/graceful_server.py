"""uvicorn's server with a graceful shutdown at the first signal and an immediate one at the second."""

import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.http.protocol import HttpProtocol
from service.settings import Settings
from service.signals import exit_at_once, handled_signals

log = logging.getLogger(__name__)
GARBAGE_OBJECTS = 10_000  # new objects after which garbage is searched for; Python's default is 700


class GracefulServer(uvicorn.Server):
    """The first SIGTERM, SIGINT or SIGHUP drains the server; the second ends the process at once.

    `announce` is called once requests are taken.
    """

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then announce it."""
        await super().startup(sockets)
        # Searching for garbage took a fifth of the time of requests, which leave none behind.
        gc.collect()
        gc.freeze()  # what is there now stays
        gc.set_threshold(GARBAGE_OBJECTS)
        if self.started:
            self._announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs. A drained server then ends by itself, with status 0."""
        before = {number: signal.signal(number, self.handle_exit) for number in handled_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal. Before the server listens, or at a second signal, the process ends without draining.

        Workers and jobs notice that the process is gone, and end too.
        """
        if self.should_exit or not hasattr(self, "servers"):
            exit_at_once(sig)
        self.should_exit = True
        log.info("stopping: the accepted requests are answered first")


def uvicorn_config(app: FastAPI, settings: Settings, protocol: type[HttpProtocol] = HttpProtocol) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.http.host,
        port=settings.http.port,
        http=protocol,
        lifespan="on",
        proxy_headers=False,  # the app reads these headers itself
        timeout_keep_alive=settings.http.keep_alive_seconds,
        timeout_graceful_shutdown=settings.http.drain_seconds,
        log_config=None,
        access_log=False,
        ws_max_size=settings.http.max_body_bytes,
        ws_per_message_deflate=False,  # images are compressed already
        server_header=False,
    )
