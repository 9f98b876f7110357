"""One tree of errors, and one table from error to status and OpenAI error type."""

import math
from typing import Any

MIN_RETRY_SECONDS = 0.1  # seconds; with 0, clients would retry at once without end

MAX_EXCERPT_CHARACTERS = 100  # characters of a client's text that an error repeats


def excerpt(text: str) -> str:
    """Return the beginning of a client's text, for an error to repeat."""
    return text if len(text) <= MAX_EXCERPT_CHARACTERS else f"{text[: MAX_EXCERPT_CHARACTERS - 1]}…"


def without_middle(sentence: str) -> str:
    """Return a sentence that may contain a client's text; a long one is cut to its beginning and end."""
    return sentence if len(sentence) <= 200 else f"{sentence[:139]}…{sentence[-60:]}"


def quoted(text: str) -> str:
    """Return an excerpt in quotes, special characters escaped."""
    return repr(excerpt(text))


class ServiceError(Exception):
    """Something that a client is told. `param` names the request's field at fault, `code` the case for programs."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = None if param is None else excerpt(param)
        self.code = code


class InvalidRequest(ServiceError):
    """A field that is missing, unknown, of the wrong type, or asks for what the model cannot do."""


class Blocked(ServiceError):
    """An image that the safety check refuses; the request was in order, and another prompt or seed may pass."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param, "moderation_blocked")


class Unauthorized(ServiceError):
    """No API key, or one that is not known."""


class Forbidden(ServiceError):
    """An API key that is known, but not for this."""


class NotFound(ServiceError):
    """A path, model or link that does not exist, or no longer."""


class MethodNotAllowed(ServiceError):
    """A path that exists, asked in another way."""


class BodyTooLarge(ServiceError):
    """More bytes than the server reads."""


class HeadTooLarge(ServiceError):
    """A path and headers of more bytes than the server reads."""


class TooSlow(ServiceError):
    """A head or body of a request that does not arrive in time."""


class Overloaded(ServiceError):
    """The queue is full or a limit reached. There is room in `retry_after` seconds, which the message says too.

    `position` is how many images wait before those that were refused, where that is what they were refused for.
    """

    def __init__(self, message: str, retry_after: float, code: str, position: int | None = None) -> None:
        self.retry_after = max(retry_after, MIN_RETRY_SECONDS)
        wait = f"{self.retry_after:.1f}" if self.retry_after < 10 else f"{math.ceil(self.retry_after)}"
        super().__init__(f"{message}; try again in {wait} s", code=code)
        self.position = position


class GenerationFailed(ServiceError):
    """The model failed on this one image."""


class TimedOut(ServiceError):
    """The images were not there in the time that the request gave."""


class Unavailable(ServiceError):
    """The server is starting or draining, or what it needs is away: its database, its disk, its store of images."""


class ClientGone(ServiceError):
    """The client hung up before its answer; nobody reads this one, but the metrics count it."""


class StartError(Exception):
    """What keeps a command from its work: a model, a setting, a server that is not there. No client is told of it."""


UNAVAILABLE_RETRY_SECONDS = 5  # nobody knows how long something is away; so often the server itself looks for it

HTTP_STATUS: dict[type[ServiceError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    Blocked: (400, "image_generation_user_error"),
    Unauthorized: (401, "authentication_error"),
    Forbidden: (403, "permission_error"),
    NotFound: (404, "invalid_request_error"),
    MethodNotAllowed: (405, "invalid_request_error"),
    TooSlow: (408, "invalid_request_error"),
    BodyTooLarge: (413, "invalid_request_error"),
    Overloaded: (429, "rate_limit_error"),
    HeadTooLarge: (431, "invalid_request_error"),
    ClientGone: (499, "client_closed_request"),
    GenerationFailed: (500, "server_error"),
    ServiceError: (500, "server_error"),
    Unavailable: (503, "server_error"),
    TimedOut: (504, "server_error"),
}


def no_model(name: str) -> NotFound:
    """The error of a model that is not loaded, by the name that it was asked for."""
    return NotFound(f"there is no model {quoted(name)}; GET /v1/models lists them", "model", "model_not_found")


def to_openai(error: ServiceError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error."""
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
        case _:
            headers = {}
    return status, {"error": body}, headers
