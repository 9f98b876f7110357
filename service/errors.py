"""The exceptions of the service, and the table from exception to HTTP status and OpenAI error type."""

import math
import re
from collections.abc import Iterable
from typing import Any

MIN_RETRY_SECONDS = 0.1  # with 0, clients would retry at once, without end
MAX_EXCERPT_CHARACTERS = 100  # of a client's text that an error repeats
_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s'\"]*@")


def excerpt(text: str) -> str:
    """Return the beginning of a client's text, for an error to repeat."""
    return text if len(text) <= MAX_EXCERPT_CHARACTERS else f"{text[: MAX_EXCERPT_CHARACTERS - 1]}…"


def shortened(sentence: str) -> str:
    """Return a sentence that may contain a client's text; a long one is cut to its beginning and end."""
    return sentence if len(sentence) <= 200 else f"{sentence[:139]}…{sentence[-60:]}"


def quoted(text: str) -> str:
    """Return an excerpt in quotes, special characters escaped."""
    return repr(excerpt(text))


def without_credentials(text: str) -> str:
    """Return a text without the user and password of the URLs in it, for logs and errors of the operator."""
    return _CREDENTIALS.sub("**********@", text)


class ServiceError(Exception):
    """An error that the client sees. `param` is the name of the invalid field, `code` identifies the case."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = None if param is None else excerpt(param)
        self.code = code


class InvalidRequest(ServiceError):
    """A field that is missing, unknown, of the wrong type, or not supported by the model."""


class Blocked(ServiceError):
    """An image that the safety check blocks. The request is valid; another prompt or seed may pass."""


class Unauthorized(ServiceError):
    """A missing or unknown API key."""


class Forbidden(ServiceError):
    """A known API key without the scope, or a web page of another origin."""


class NotFound(ServiceError):
    """A path, model or link that does not exist."""


class MethodNotAllowed(ServiceError):
    """A path that exists, with a method that it does not support."""


class BodyTooLarge(ServiceError):
    """A body over the size limit."""


class RangeNotSatisfiable(ServiceError):
    """A `Range` beyond the end of a file of `size` bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the Range header begins beyond the end of the file, which has {size} bytes", "Range")
        self.size = size


class HeadTooLarge(ServiceError):
    """A path and headers over the size limit."""


class TooSlow(ServiceError):
    """A request whose head or body does not arrive in time."""


class Overloaded(ServiceError):
    """The queue is full or a limit is reached. The client may retry after `retry_after` seconds.

    `position` is the number of images that wait before the request, if the queue is the reason.
    """

    def __init__(self, message: str, retry_after: float, code: str, position: int | None = None) -> None:
        self.retry_after = max(retry_after, MIN_RETRY_SECONDS)
        wait = f"{self.retry_after:.1f}" if self.retry_after < 10 else f"{math.ceil(self.retry_after)}"
        super().__init__(f"{message}; try again in {wait} s", code=code)
        self.position = position


class GenerationFailed(ServiceError):
    """The model failed on this image, also alone in a batch."""


class TimedOut(ServiceError):
    """The images were not ready within the timeout of the request."""


class Unavailable(ServiceError):
    """The server is starting or draining, or its database, disk or store of images is unavailable."""


class ClientGone(ServiceError):
    """The client disconnected before the answer. No client sees this error; the metrics count it."""


class StartError(Exception):
    """A command cannot start: an invalid model or setting, or an unreachable server. No client sees this error."""


UNAVAILABLE_RETRY_SECONDS = 5  # between the server's own attempts; the end of an outage is unknown

HTTP_STATUS: dict[type[ServiceError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    Blocked: (400, "image_generation_user_error"),
    Unauthorized: (401, "authentication_error"),
    Forbidden: (403, "permission_error"),
    NotFound: (404, "invalid_request_error"),
    MethodNotAllowed: (405, "invalid_request_error"),
    TooSlow: (408, "invalid_request_error"),
    BodyTooLarge: (413, "invalid_request_error"),
    RangeNotSatisfiable: (416, "invalid_request_error"),
    Overloaded: (429, "rate_limit_error"),
    HeadTooLarge: (431, "invalid_request_error"),
    ClientGone: (499, "client_closed_request"),
    GenerationFailed: (500, "server_error"),
    ServiceError: (500, "server_error"),
    Unavailable: (503, "server_error"),
    TimedOut: (504, "server_error"),
}


def no_model(name: str) -> NotFound:
    """Return the error for a name that no loaded model has."""
    return NotFound(f"there is no model {quoted(name)}; GET /v1/models lists them", "model", "model_not_found")


def no_adapter(model: str, adapter: str, known: Iterable[str]) -> InvalidRequest:
    """Return the error for a name that no adapter of a model has."""
    message = f"{model} has no adapter {quoted(adapter)}; it has {', '.join(known) or 'none: leave lora out'}"
    return InvalidRequest(message, "lora.name", "adapter_not_found")


def to_openai(error: ServiceError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return the HTTP status, body and headers of an error."""
    status, kind = HTTP_STATUS[type(error)]
    body = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    match error:
        case Overloaded():
            milliseconds = math.ceil(1000 * error.retry_after)
            headers = {"retry-after": str(math.ceil(error.retry_after)), "retry-after-ms": str(milliseconds)}
            if error.position is not None:
                headers["x-queue-position"] = str(error.position)
        case Unavailable():
            headers = {"retry-after": str(UNAVAILABLE_RETRY_SECONDS)}
        case Unauthorized():
            headers = {"www-authenticate": "Bearer"}
        case BodyTooLarge() | TooSlow():
            headers = {"connection": "close"}  # the rest of the body is never read
        case RangeNotSatisfiable():
            headers = {"content-range": f"bytes */{error.size}"}
        case _:
            headers = {}
    return status, {"error": body}, headers
