"""A web server that records the webhooks it receives."""

import base64
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


class Receiver:
    """A web server that records webhooks. It answers with one status after another, and repeats the last."""

    def __init__(self, *statuses: int) -> None:
        received: list[tuple[dict[str, str], bytes]] = []
        arrived = threading.Condition()
        left = list(statuses)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                self.send_response(left.pop(0) if len(left) > 1 else left[0])
                self.end_headers()
                with arrived:
                    received.append((dict(self.headers), body))
                    arrived.notify_all()

            def log_message(self, *_: object) -> None:
                pass

        self.received, self._arrived = received, arrived
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"

    def wait(self, count: int) -> None:
        """Wait until it has received so many webhooks."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.received) >= count, timeout=60)


@contextmanager
def receiving(*statuses: int) -> Iterator[Receiver]:
    receiver = Receiver(*statuses)
    threading.Thread(target=receiver.server.serve_forever, daemon=True).start()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()
