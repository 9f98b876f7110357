"""`WS /v1/realtime/images`: images while a prompt is typed."""

from typing import Annotated

from fastapi import APIRouter, Header, WebSocket
from fastapi.security.utils import get_authorization_scheme_param

from service.http.dependencies import Service
from service.http.origins import allowed
from service.images.realtime import Session

router = APIRouter(prefix="/v1/realtime")


@router.websocket("/images")
async def images(
    socket: WebSocket,
    service: Service,
    origin: Annotated[str | None, Header()] = None,
    host: Annotated[str, Header()] = "",
    authorization: Annotated[str, Header()] = "",
    api_key: Annotated[str, Header()] = "",
    x_api_key: Annotated[str, Header()] = "",
) -> None:
    """Serve one session. Pages of other origins are refused as CORS would refuse them, before anything is said."""
    open_sessions = service.metrics.sessions
    full = service.sessions >= service.settings.realtime_limit
    if full or not (origin is None or allowed(origin, host, service.settings)):
        await socket.close()  # before it is accepted, this is status 403
        return
    await socket.accept()
    service.sessions += 1
    open_sessions.inc()
    try:
        scheme, bearer = get_authorization_scheme_param(authorization)
        token = bearer if scheme.lower() == "bearer" and bearer else api_key or x_api_key
        await Session(socket, service, token).run()
    finally:
        service.sessions -= 1
        open_sessions.dec()
