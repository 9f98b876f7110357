"""`RunLog`: a JSON-lines log of a run, read while the run appends to it."""

import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

Kind = Literal["metrics", "evaluation", "alarm"]
BLOCK = 1 << 16  # bytes that are read at a time from the end of a log


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
        return self._parsed(self._new())

    def all(self) -> Iterator[LogLine]:
        return RunLog(self._kind, self._path).new()

    def newest(self, images: int) -> LogLine | None:
        """Return the last line after at most so many images. Reads no more of the file than it needs."""
        return next((line for line in self._parsed(self._backwards()) if line.images <= images), None)

    def _new(self) -> Iterator[bytes]:
        with self._open() as file:
            file.seek(self._end - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._last, self._end = b"", 0
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._last, self._end = line, self._end + len(line)
                yield line

    def _backwards(self) -> Iterator[bytes]:
        with self._open() as file:
            start, rest = file.seek(0, os.SEEK_END), b""
            while start:
                length = min(start, BLOCK)
                start -= length
                file.seek(start)
                rest, *lines = (file.read(length) + rest).split(b"\n")
                yield from reversed(lines)
            yield rest

    def _open(self) -> BinaryIO:
        try:
            return self._path.open("rb")
        except FileNotFoundError:
            return io.BytesIO()

    def _parsed(self, lines: Iterable[bytes]) -> Iterator[LogLine]:
        """Skip lines that are invalid, as a killed writer may leave them."""
        for line in lines:
            try:
                values = json.loads(line, parse_constant=lambda _: None, parse_float=_finite)  # NaN is not JSON
                named = self._kind != "alarm" or (
                    isinstance(values["name"], str) and isinstance(values["message"], str)
                )
                if named and isinstance(values["images"], int) and 0 <= values["images"] < 2**63:
                    yield LogLine(self._kind, values["images"], values)
            except (ValueError, TypeError, KeyError, RecursionError):
                continue


def _finite(text: str) -> float | None:
    """Return a number of JSON, or None if it is too large for a float."""
    number = float(text)
    return number if math.isfinite(number) else None
