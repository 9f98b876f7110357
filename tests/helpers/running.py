"""A real server on a free port of the loopback, in its own thread, and its metrics."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import httpx
import uvicorn

from service.http.graceful_server import uvicorn_config
from service.http.protocol import HttpProtocol


@contextlib.contextmanager
def serving(app, protocol: type[HttpProtocol] = HttpProtocol, port: int = 0) -> Iterator[str]:
    """The app behind uvicorn, on a free port if none is given; yields its base URL, and drains it at the end.

    The end waits longer than the server drains. A server that outlived its test would leave its errors, such as open
    connections, to whatever test runs by then.
    """
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn_config(app, app.state.settings, protocol))
    started = threading.Event()
    startup = server.startup

    async def announced(sockets=None):
        await startup(sockets)
        started.set()

    server.startup = announced
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert started.wait(60)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(app.state.settings.http.drain_seconds + 90)
        listener.close()
        assert not thread.is_alive()


def generate(url: str, headers=None, **body) -> httpx.Response:
    """Request images of a prompt, by default "a"."""
    return httpx.post(f"{url}/v1/images/generations", json={"prompt": "a", **body}, headers=headers)


def metric(url: str, name: str, **labels: str) -> float:
    """Return a metric's value, summed over the labels that are not given."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    total = 0.0
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        sample, _, value = line.rpartition(" ")
        if sample.split("{")[0] == f"fgm_{name}" and all(label in sample for label in wanted):
            total += float(value)
    return total


def until(condition) -> None:
    """Poll a server until a condition holds; fail after many tries."""
    pause = threading.Event()
    assert any(condition() or pause.wait(0.02) for _ in range(3000))
