"""Parses a line of a batch's input file into a request."""

import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from service.engine.request import GenerationRequest
from service.errors import InvalidRequest, ServiceError
from service.http.error_handlers import field_error
from service.images.request import RANDOM_SEEDS, OutputOptions
from service.images.service import ImageService
from service.jobs.batches.lines import WINDOW_SECONDS, line_digest
from service.jobs.schemas import BatchLine
from service.jobs.tables import BatchRow
from service.settings import Settings

BODY = "body."  # before the names of fields of the request in a line


@dataclass(frozen=True)
class LineRequest:
    """A valid line of the input file."""

    number: int  # from 1, as editors count
    custom_id: str
    generation: GenerationRequest
    output: OutputOptions


def parse(images: ImageService, settings: Settings, batch: BatchRow, number: int, line: bytes) -> LineRequest:
    """Return the request of a line with all defaults applied. Raises a ServiceError that names the line's field."""
    max_bytes = settings.http.max_body_bytes
    if len(line) > max_bytes:
        raise InvalidRequest(f"the line is over {max_bytes} bytes", code="line_too_long")
    try:
        read = BatchLine.model_validate_json(line.rstrip(), context={"unsupported": settings.images.unsupported_fields})
    except ValidationError as error:
        raise _line_error(error) from None
    body = read.body
    if body.stream:
        raise InvalidRequest("a batch does not stream", "body.stream", "invalid_value")
    if body.partial_images:
        body.reject("body.partial_images", "a batch does not stream")
    if body.response_format == "b64_json":
        raise InvalidRequest("a batch answers with links", "body.response_format", "invalid_value")
    if body.timeout is not None:
        body.reject("body.timeout", "lines of a batch have no timeout of their own")
    if body.priority == "interactive":
        body.reject("body.priority", "lines of a batch have the priority 'batch'")
    changes: dict[str, Any] = {"priority": "batch", "timeout": float(WINDOW_SECONDS)}
    if body.seed is None:
        changes["seed"] = int.from_bytes(line_digest(batch.id, number)) % (RANDOM_SEEDS - (body.n or 1))
    try:
        generation, output = images.resolve(body.model_copy(update=changes), batch.owner)
    except ServiceError as error:
        error.param = error.param and f"{BODY}{error.param}"
        raise
    return LineRequest(number, read.custom_id, generation, output)


def _line_error(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_input=False, include_url=False)[0]
    if first["type"] == "json_invalid":
        # Without its number of the line, which is always 1 here.
        reason = re.sub(r" at line \d+ column (\d+)$", r" (character \1)", first["ctx"]["error"])
        return InvalidRequest(f"the line is not JSON: {reason}", code="invalid_json_line")
    if not first["loc"]:
        return InvalidRequest(f"the line: {first['msg']}", code="invalid_request")
    wrong = field_error(first["type"], first["loc"], first["msg"])
    wrong.code = {"method": "invalid_method", "url": "invalid_url"}.get(wrong.param or "", "invalid_request")
    return wrong
