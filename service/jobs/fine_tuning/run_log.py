"""`RunLog`: a JSON-lines log of a run, read while the run appends to it."""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["metrics", "evaluation", "alarm"]


@dataclass(frozen=True)
class LogLine:
    """A line of a log after so many images. A resumed run may write a line with the same `key` again."""

    kind: Kind
    images: int
    values: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.kind}-{self.values.get('name', self.images)}"


class RunLog:
    """A log that another process appends to, or replaces by a shorter file that then grows again."""

    def __init__(self, kind: Kind, path: Path) -> None:
        self._kind = kind
        self._path = path
        self._last = b""  # the line that was read last
        self._end = 0  # its end in the file

    def new(self) -> Iterator[LogLine]:
        """Yield the complete lines since the last call, or all if the line that was read last is no longer there."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._end - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._last, self._end = b"", 0
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._last, self._end = line, self._end + len(line)
                if (parsed := self._parsed(line)) is not None:
                    yield parsed

    def _parsed(self, line: bytes) -> LogLine | None:
        """Return a line, or None for an invalid one, as a killed writer may leave it."""
        try:
            values = json.loads(line, parse_constant=lambda _: None, parse_float=_finite)  # NaN is not JSON
            named = self._kind != "alarm" or (isinstance(values["name"], str) and isinstance(values["message"], str))
            if named and isinstance(values["images"], int) and 0 <= values["images"] < 2**63:
                return LogLine(self._kind, values["images"], values)
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        return None


def _finite(text: str) -> float | None:
    """Return a number of JSON, or None if it is too large for a float."""
    number = float(text)
    return number if math.isfinite(number) else None
