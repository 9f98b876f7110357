"""`WS /v1/realtime/images`: images while a prompt is typed."""

from typing import Annotated

from fastapi import APIRouter, Header, WebSocket
from fastapi.security.utils import get_authorization_scheme_param

from service.http.dependencies import RealtimeDep, SettingsDep
from service.http.origins import check_origin

router = APIRouter(prefix="/v1/realtime")


@router.websocket("/images")
async def images(
    socket: WebSocket,
    sessions: RealtimeDep,
    settings: SettingsDep,
    origin: Annotated[str | None, Header()] = None,
    host: Annotated[str, Header()] = "",
    authorization: Annotated[str, Header()] = "",
    api_key: Annotated[str, Header()] = "",
    x_api_key: Annotated[str, Header()] = "",
) -> None:
    """Serve one session. Pages of other origins are refused before the connection is accepted, like by CORS."""
    sessions.check_room()
    check_origin(origin, host, settings)
    await socket.accept()
    scheme, bearer = get_authorization_scheme_param(authorization)
    token = bearer if scheme.lower() == "bearer" and bearer else api_key or x_api_key
    await sessions.serve(socket, token)
