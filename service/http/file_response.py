"""`StoredFileResponse`: a file, or the part of it that the `Range` header asks for."""

import asyncio
import os

from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from service.errors import InvalidRequest, NotFound, RangeNotSatisfiable


class StoredFileResponse(FileResponse):
    """Starlette's response, which raises our errors for a missing file and an invalid `Range`.

    The file is opened before the response starts, so that a deletion meanwhile does not interrupt it.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_or_raise(message: Message) -> None:
            match message:
                case {"type": "http.response.start", "status": 416}:
                    raise RangeNotSatisfiable(int(self.headers["content-length"]))
                case {"type": "http.response.start", "status": 400}:
                    raise InvalidRequest("the Range header must be bytes=FIRST-LAST", "Range", "invalid_value")
                case _:
                    await send(message)

        try:
            opened = await asyncio.to_thread(open, self.path, "rb")
        except FileNotFoundError:
            raise NotFound("this file does not exist any more", code="file_not_found") from None
        with opened:
            self.stat_result = os.fstat(opened.fileno())
            self.set_stat_headers(self.stat_result)
            self.path = f"/dev/fd/{opened.fileno()}"
            await super().__call__(scope, receive, send_or_raise)
