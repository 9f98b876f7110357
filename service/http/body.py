"""A request's body as JSON."""

import json
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError


async def read_json(request: Request) -> Any:
    """Return the value of a JSON body, or the bytes of an empty or other one, which no model validates.

    Raises the errors for which FastAPI has handlers.
    """
    content = await request.body()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    if not content or not is_json:
        return content
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        found = {"type": "json_invalid", "loc": ("body", error.pos), "msg": error.msg, "ctx": {"error": error.msg}}
        raise RequestValidationError([found]) from error
    except (ValueError, RecursionError) as error:  # text that is not Unicode, numbers that are too long
        raise HTTPException(400, "the body cannot be read") from error
