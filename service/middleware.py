"""What every request passes: an id, a limit on its body, and a count of its answer. Plain ASGI, so nothing buffers."""

import secrets

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTooLarge, to_openai
from service.metrics import Metrics


class Front:
    """Outermost layer of the app."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let an HTTP request through; anything else passes as it is."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        received = 0
        refused = False

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        async def refuse() -> None:
            nonlocal refused
            refused = True
            error = BodyTooLarge(f"the body is over {self._max_body_bytes} bytes")
            status, body, _ = to_openai(error)
            await JSONResponse(body, status, {"connection": "close"})(scope, receive, labelled)

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes and not refused:
                await refuse()
            return {"type": "http.disconnect"} if refused else message

        async def unless_refused(message: Message) -> None:
            if not refused:
                await labelled(message)

        await self._app(scope, limited, unless_refused)
