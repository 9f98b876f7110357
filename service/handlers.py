"""Whatever goes wrong in a request, as an OpenAI error object."""

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service.errors import (
    BodyTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    ServiceError,
    TooSlow,
    Unavailable,
    to_openai,
)
from service.files import DISK_FULL

_UNSUPPORTED = ("extra_forbidden", "none_required")  # pydantic's names for a field that we do not take


def install(app: FastAPI) -> None:
    """Answer in one form our own errors, complaints about a body or a path, and a disk that is full."""
    app.add_exception_handler(ServiceError, _ours)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(OSError, _disk)


def respond(error: ServiceError) -> JSONResponse:
    """The response that tells of an error."""
    status, body, headers = to_openai(error)
    return JSONResponse(body, status, headers)


async def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return respond(error)


async def _validation(request: Request, error: Exception) -> JSONResponse:
    """The first complaint, with the field as `param`; the values themselves, prompts among them, are not repeated."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return respond(InvalidRequest("the body is not JSON", code="invalid_json"))
    if not first["loc"][1:]:
        return respond(InvalidRequest("the body must be a JSON object, sent as application/json", code="invalid_json"))
    return respond(complaint(first["type"], first["loc"][1:], first["msg"]))


def complaint(kind: str, field: Sequence[str | int], message: str) -> InvalidRequest:
    """Pydantic's complaint about a field."""
    param = ".".join(map(str, field))
    if kind in _UNSUPPORTED:
        return InvalidRequest(f"{param} is not supported", param, "unknown_parameter")
    return InvalidRequest(f"{param}: {message}", param, "invalid_value")


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    match error.status_code:
        case 404:
            return respond(NotFound(f"there is no {request.url.path}"))
        case 405:
            response = respond(MethodNotAllowed(f"{request.method} is not allowed on {request.url.path}"))
            response.headers.update(error.headers or {})  # which methods are
            return response
        case 408:
            return respond(TooSlow(error.detail))
        case 413:
            return respond(BodyTooLarge(error.detail))
        case _:
            return respond(InvalidRequest(error.detail))


async def _disk(request: Request, error: Exception) -> JSONResponse:
    """A disk that is full gets room some day; any other failure is one of ours."""
    assert isinstance(error, OSError)
    if error.errno not in DISK_FULL:
        raise error
    return respond(Unavailable("the server's disk is full; try again later", code="disk_full"))
