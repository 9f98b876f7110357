"""uvicorn's server, which a second signal ends at once."""

import signal
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.protocol import Protocol
from service.settings import Settings


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT drains; the second ends the process, whatever it waits for."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for each signal. Workers and jobs see that the process is gone, and end too."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)


def uvicorn_config(app: FastAPI, settings: Settings, protocol: type[Protocol] = Protocol) -> uvicorn.Config:
    """Return how uvicorn serves the app."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol,
        lifespan="on",
        proxy_headers=False,  # the app reads them
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=settings.drain_seconds,
        log_config=None,
        access_log=False,
        ws_max_size=settings.max_body_bytes,
        ws_per_message_deflate=False,  # images are compressed already
        server_header=False,
    )
