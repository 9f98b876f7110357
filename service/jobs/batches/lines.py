"""The lines of a batch: requests of the input file, answers of the output and error file."""

import hashlib
import itertools
import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from service.schemas import Usage

Outcome = Literal["answered", "expired", "cancelled"]

WINDOW_SECONDS = 86_400  # in which a batch and each of its lines must be answered


@dataclass(frozen=True)
class LineError:
    """Why a line, or the whole batch, cannot be answered."""

    code: str
    message: str
    line: int | None  # none for the whole batch
    param: str | None


@dataclass(frozen=True)
class LineAnswer:
    """A line of the output or error file."""

    number: int
    failed: bool
    text: str  # JSON, without a line break
    input_tokens: int = 0
    output_tokens: int = 0

    @classmethod
    def of(
        cls,
        request_id: str,
        batch_id: str,
        number: int,
        custom_id: str,
        status: int,
        body: Mapping[str, Any],
        usage: Usage | None = None,
    ) -> "LineAnswer":
        """Return the answer that the same request would get outside a batch."""
        response = {"status_code": status, "request_id": request_id, "body": body}
        text = _text(batch_id, number, custom_id, response, None)
        tokens = (usage.input_tokens, usage.output_tokens) if usage else (0, 0)
        return cls(number, status != 200, text, *tokens)


def numbered_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield lines with their numbers from 1. A line over the limit is cut and is the last. Raises FileNotFoundError."""
    with path.open("rb") as file:
        if file.read(len(BOM_UTF8)) != BOM_UTF8:  # a byte order mark
            file.seek(0)
        for number in itertools.count(1):
            line = file.readline(max_bytes + 1)
            if line:
                yield number, line
            if not line or len(line) > max_bytes:
                return


def custom_id_of(line: bytes) -> str:
    """Return the custom_id of a line that is known to be valid."""
    custom_id: str = json.loads(line)["custom_id"]
    return custom_id


def unanswered(batch_id: str, number: int, line: bytes, outcome: Outcome) -> str:
    """Return the line of the error file for a line that was not answered."""
    message = f"the batch was {outcome} before this request was answered"
    return _text(batch_id, number, custom_id_of(line), None, {"code": f"batch_{outcome}", "message": message})


def _text(batch_id: str, number: int, custom_id: str, response: object, error: object) -> str:
    line_id = f"batch_req_{line_digest(batch_id, number).hex()}"
    return json.dumps({"id": line_id, "custom_id": custom_id, "response": response, "error": error})


def line_digest(batch_id: str, number: int) -> bytes:
    """Return bytes that identify a line over all batches."""
    return hashlib.blake2b(f"{batch_id} {number}".encode(), digest_size=12).digest()
