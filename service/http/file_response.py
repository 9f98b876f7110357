"""`StoredFileResponse`: a file, or the part of it that the `Range` header asks for."""

from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from service.errors import InvalidRequest, RangeNotSatisfiable


class StoredFileResponse(FileResponse):
    """Starlette's response, whose refusals of a `Range` are raised as our errors."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_or_raise(message: Message) -> None:
            match message:
                case {"type": "http.response.start", "status": 416}:
                    raise RangeNotSatisfiable(int(self.headers["content-length"]))
                case {"type": "http.response.start", "status": 400}:
                    raise InvalidRequest("the Range header must be bytes=FIRST-LAST", "Range", "invalid_value")
                case _:
                    await send(message)

        await super().__call__(scope, receive, send_or_raise)
