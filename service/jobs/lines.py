"""The lines of a batch: what one of the input asks for, and what one of the output or error file says of it."""

import hashlib
import itertools
import json
import secrets
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from service.engine.batcher import Priority
from service.errors import InvalidRequest, ServiceError
from service.http.error_handlers import field_error
from service.images.generation import RANDOM_SEEDS, Order
from service.jobs.schemas import BatchLine
from service.schemas import Usage
from service.state import State

Outcome = Literal["answered", "expired", "cancelled"]

WINDOW_SECONDS = 86_400  # that a batch is given, and each of its lines


@dataclass(frozen=True)
class Request:
    """A line that can be made."""

    number: int  # from 1, as editors count
    custom_id: str
    order: Order


@dataclass(frozen=True)
class Complaint:
    """Why a line, or the whole batch, cannot be made."""

    code: str
    message: str
    line: int | None  # none for the whole batch
    param: str | None


@dataclass(frozen=True)
class Answer:
    """What came of a line."""

    number: int
    failed: bool
    text: str  # JSON, without a line's end
    input_tokens: int = 0
    output_tokens: int = 0

    @classmethod
    def of(
        cls,
        batch_id: str,
        number: int,
        custom_id: str,
        status: int,
        body: Mapping[str, Any],
        usage: Usage | None = None,
    ) -> "Answer":
        """What a request of its own would have been answered with."""
        response = {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": body}
        text = _text(batch_id, number, custom_id, response, None)
        tokens = (usage.input_tokens, usage.output_tokens) if usage else (0, 0)
        return cls(number, status != 200, text, *tokens)


def numbered(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Lines from 1, with their ends; the one that is over the limit is cut, and the last. Raises FileNotFoundError."""
    with path.open("rb") as file:
        if file.read(len(BOM_UTF8)) != BOM_UTF8:  # a byte order mark
            file.seek(0)
        for number in itertools.count(1):
            line = file.readline(max_bytes + 1)
            if line:
                yield number, line
            if not line or len(line) > max_bytes:
                return


def parse(service: State, batch_id: str, number: int, line: bytes) -> Request | Complaint:
    """What a line asks for, with every choice made, or why it cannot be."""
    max_bytes = service.settings.max_body_bytes
    if len(line) > max_bytes:
        return Complaint("line_too_long", f"the line is over {max_bytes} bytes", number, None)
    try:
        read = BatchLine.model_validate_json(line, context={"unsupported": service.settings.unsupported})
        body = read.body
        if body.stream:
            raise InvalidRequest("a batch does not stream", "body.stream", "invalid_value")
        if body.partial_images:
            body.reject("body.partial_images", "a batch does not stream")
        if body.response_format == "b64_json":
            raise InvalidRequest("a batch answers with links", "body.response_format", "invalid_value")
        if body.timeout is not None:
            body.reject("body.timeout", "a batch takes its time")
        if body.priority == "interactive":
            body.reject("body.priority", "a batch waits for interactive work")
        order = Order.of(body, service.card(body.model))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        if first["type"] == "json_invalid":
            return Complaint("invalid_json_line", f"the line is not JSON: {first['ctx']['error']}", number, None)
        if not first["loc"]:
            return Complaint("invalid_request", f"the line: {first['msg']}", number, None)
        wrong = field_error(first["type"], first["loc"], first["msg"])
        code = {"method": "invalid_method", "url": "invalid_url"}.get(wrong.param or "", "invalid_request")
        return Complaint(code, wrong.message, number, wrong.param)
    except ServiceError as error:
        return Complaint(error.code or "invalid_request", error.message, number, error.param)
    if body.seed is None:
        count = len(order.seeds)
        drawn = int.from_bytes(_digest(batch_id, number)) % (RANDOM_SEEDS - count)
        order = replace(order, seeds=range(drawn, drawn + count))
    return Request(number, read.custom_id, replace(order, priority=Priority.BATCH, timeout=float(WINDOW_SECONDS)))


def id_of(line: bytes) -> str:
    """The custom_id of a line that was parsed before."""
    custom_id: str = json.loads(line)["custom_id"]
    return custom_id


def unanswered(batch_id: str, number: int, line: bytes, outcome: Outcome) -> str:
    """A line of the error file, for one of the input that was not made."""
    message = f"the batch was {outcome} before this request was made"
    return _text(batch_id, number, id_of(line), None, {"code": f"batch_{outcome}", "message": message})


def _text(batch_id: str, number: int, custom_id: str, response: object, error: object) -> str:
    line_id = f"batch_req_{_digest(batch_id, number).hex()}"
    return json.dumps({"id": line_id, "custom_id": custom_id, "response": response, "error": error})


def _digest(batch_id: str, number: int) -> bytes:
    return hashlib.blake2b(f"{batch_id} {number}".encode(), digest_size=12).digest()
