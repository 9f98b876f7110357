"""Exception handlers: every exception becomes an OpenAI error object with the status of `errors.HTTP_STATUS`."""

import contextlib
import json
import logging
import sys
from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from service.errors import (
    BodyTooLarge,
    ClientGone,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    ServiceError,
    TooSlow,
    Unavailable,
    excerpt,
    to_openai,
)
from service.files import DISK_FULL, NOT_WRITABLE
from service.schemas import FIELD_ADVICE, IGNORABLE_FIELDS, PATTERN_ADVICE

log = logging.getLogger(__name__)

_UNSUPPORTED_TYPES = ("extra_forbidden", "none_required")  # pydantic's names for an unsupported field
# Messages in place of pydantic's, which speak of Python's types or repeat a pattern.
_MESSAGES = {
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "Input should be a JSON object"),
    "list_type": "Input should be a JSON array",
    "string_pattern_mismatch": "Input has characters or a form that are not allowed",
}


def install(app: FastAPI) -> None:
    """Add the handlers of our own errors, of validation and routing errors, and of disk errors."""
    app.router.default = _no_route  # also of WebSockets, which Starlette's own one closes without an answer
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(OSError, _disk_error)


def error_response(error: ServiceError) -> JSONResponse:
    status, body, headers = to_openai(error)
    return JSONResponse(body, status, headers)


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    raise HTTPException(404)


async def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return error_response(error)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with the first error and its field as `param`. Values, prompts among them, are not repeated."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        place = first["loc"][-1]
        return _unreadable(request, f"the body is not JSON: {first['ctx']['error']} (character {place})")
    if first["type"] == "string_unicode" and not first["loc"][1:]:
        return error_response(InvalidRequest("the name of a field is not valid Unicode text", code="invalid_json"))
    if not first["loc"][1:]:
        return error_response(
            InvalidRequest("the body must be a JSON object, sent as application/json", code="invalid_json")
        )
    return error_response(field_error(first["type"], first["loc"][1:], first["msg"]))


def request_error(error: ValidationError, *place: str) -> RequestValidationError:
    """Return FastAPI's error for a part of a request that a handler validated: `body`, or `header` and its name."""
    errors = error.errors(include_input=False)
    return RequestValidationError([{**each, "loc": (*place, *each["loc"])} for each in errors])


def field_error(kind: str, field: Sequence[str | int], message: str) -> InvalidRequest:
    """Return the error for pydantic's error of a field."""
    param = excerpt(".".join(map(str, field)))
    name = str(field[-1])
    message = _MESSAGES.get(kind, message.removeprefix("Value error, ").replace(" after validation", ""))
    advice = FIELD_ADVICE.get(name, "or leave it out" if name in IGNORABLE_FIELDS else None)
    if kind == "string_pattern_mismatch":
        advice = PATTERN_ADVICE.get(name, advice)
    if kind in _UNSUPPORTED_TYPES:
        return InvalidRequest(f"{param} is not supported; {advice or 'leave it out'}", param, "unknown_parameter")
    return InvalidRequest(f"{param}: {message}" + (f"; {advice}" if advice else ""), param, "invalid_value")


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    match error.status_code:
        case 404:
            return error_response(NotFound(f"there is no {excerpt(request.url.path)}"))
        case 405:
            allowed = ", ".join(_methods(request))
            response = error_response(MethodNotAllowed(f"{excerpt(request.url.path)} takes {allowed} only"))
            response.headers["allow"] = allowed
            return response
        case 408:
            return error_response(TooSlow(error.detail))
        case 413:
            return error_response(BodyTooLarge(error.detail))
        case 499:
            return error_response(ClientGone(error.detail))
        case _ if error.__cause__ is not None:  # FastAPI failed to read a JSON body
            return await _undecodable(request, error.__cause__)
        case _:
            return _unreadable(request, f"the form cannot be read: {error.detail}", code="invalid_form")


async def _undecodable(request: Request, cause: BaseException) -> JSONResponse:
    """Answer a JSON body whose text or numbers could not be read."""
    if isinstance(cause, UnicodeDecodeError):
        return _unreadable(request, f"the body is not UTF-8 text: byte {cause.start} cannot be decoded")
    if isinstance(cause, RecursionError):
        return _unreadable(request, "the body is nested too deeply")
    digits = sys.get_int_max_str_digits()
    param = _first_long_number(await request.body(), digits)
    message = f"{param or 'the body'}: a number has more than {digits} digits"
    return _unreadable(request, message, param, "invalid_value")


def _unreadable(
    request: Request, message: str, param: str | None = None, code: str | None = "invalid_json"
) -> JSONResponse:
    """Answer a body that cannot be read; if it is compressed, the error says so."""
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() == "identity":
        return error_response(InvalidRequest(message, param, code))
    message = f"the server reads no body with Content-Encoding: {excerpt(coding)}; send it without"
    return error_response(InvalidRequest(message, code="unsupported_encoding"))


def _first_long_number(body: bytes, digits: int) -> str | None:
    """Return the name in a JSON body of the first number with too many digits; None if it is in no object."""
    too_long = object()
    names: list[str] = []

    def note(pairs: list[tuple[str, object]]) -> None:
        names.extend(excerpt(name) for name, value in pairs if value is too_long)

    with contextlib.suppress(ValueError, RecursionError):  # caused by text after the number
        json.loads(body, parse_int=lambda text: too_long if len(text) > digits else 0, object_pairs_hook=note)
    return names[0] if names else None


def _methods(request: Request) -> list[str]:
    """Return the methods that a path accepts in any route; each route knows only its own."""
    routes = request.app.router.routes
    taken = [
        method
        for method in ("GET", "POST", "DELETE")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]
    return ["HEAD", *taken] if "GET" in taken else taken


async def _disk_error(request: Request, error: Exception) -> JSONResponse:
    """Answer 503 for a disk that is full or not writable. Other errors are bugs and are raised again."""
    assert isinstance(error, OSError)
    if error.errno in DISK_FULL:
        return error_response(Unavailable("the server's disk is full; try again later", code="disk_full"))
    if error.errno in NOT_WRITABLE:
        log.error("the disk cannot be used: %s", error)
        return error_response(Unavailable("the server's disk cannot be used; try again later", code="storage_error"))
    raise error
