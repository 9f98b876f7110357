"""A web server that records the webhooks it receives."""

import base64
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


class Receiver:
    """A web server that keeps what it is told, and answers with one status after another, the last for ever."""

    def __init__(self, *statuses: int) -> None:
        told: list[tuple[dict[str, str], bytes]] = []
        heard = threading.Condition()
        left = list(statuses)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                self.send_response(left.pop(0) if len(left) > 1 else left[0])
                self.end_headers()
                with heard:
                    told.append((dict(self.headers), body))
                    heard.notify_all()

            def log_message(self, *_: object) -> None:
                pass

        self.told, self._heard = told, heard
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"

    def wait(self, count: int) -> None:
        """Until it has been told so often."""
        with self._heard:
            assert self._heard.wait_for(lambda: len(self.told) >= count, timeout=60)


@contextmanager
def receiving(*statuses: int) -> Iterator[Receiver]:
    receiver = Receiver(*statuses)
    threading.Thread(target=receiver.server.serve_forever, daemon=True).start()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()
