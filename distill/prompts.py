"""Prompt sources: the small world, text, JSON lines, CSV, Parquet or standard input, to an iterator of str."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from distill.errors import PromptError
from distill.scenes.captions import training_prompts

COLUMNS = ("prompt", "caption", "text")  # names under which a table or JSON object may hold its prompt
SCENES_COUNT = 20_000  # prompts of the small world where no count is given


def read_prompts(source: str, count: int | None = None, seed: int = 0) -> Iterator[str]:
    """Prompts of a source, at most `count`: `scenes`, `-` for standard input, or a txt, jsonl, csv or parquet file.

    Blank lines are passed over. Raises PromptError for a source that is missing, empty, or not what its name says.
    """
    if source == "scenes":
        yield from training_prompts(SCENES_COUNT if count is None else count, seed)
        return
    empty = True
    for prompt in islice(filter(None, map(str.strip, _texts(source))), count):
        empty = False
        yield prompt
    if empty:
        raise PromptError(f"{source} holds no prompts; write one a line")


def _texts(source: str) -> Iterator[str]:
    if source == "-":
        yield from _decoded("standard input", sys.stdin.buffer)
        return
    path = Path(source)
    if not path.is_file():
        raise PromptError(f"no prompt file {source}; give a txt, jsonl, csv or parquet file, `scenes`, or - for stdin")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    with path.open("rb") as file:
        lines = _decoded(path, file)
        if path.suffix == ".jsonl":
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _from_json(path, number, line)
        elif path.suffix == ".csv":
            yield from _csv(path, lines)
        else:
            yield from lines


def _decoded(name: Path | str, lines: Iterable[bytes]) -> Iterator[str]:
    """Lines as text, without the mark that some editors put before the first."""
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise PromptError(f"{name} line {number} is not UTF-8; convert it first") from None


def _csv(path: Path, lines: Iterator[str]) -> Iterator[str]:
    rows = csv.DictReader(lines)
    try:
        name = _column(path, rows.fieldnames or [])
        for row in rows:
            yield row[name] or ""
    except csv.Error as error:
        raise PromptError(f"{path} line {rows.line_num} is not CSV: {error}") from None


def _from_json(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{path} line {number} is not JSON: {error}") from None
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        text = value[_column(path, list(value))]
        if isinstance(text, str):
            return text
    raise PromptError(f"{path} line {number} holds no text; write a string or an object with {COLUMNS[0]!r}")


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        name = _column(path, file.schema_arrow.names)
        for batch in file.iter_batches(columns=[name]):
            yield from (text or "" for text in batch.column(0).cast(pa.string()).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise PromptError(f"{path} cannot be read as Parquet: {error}") from None


def _column(path: Path, names: Sequence[str]) -> str:
    for name in COLUMNS:
        if name in names:
            return name
    raise PromptError(f"{path} has no column {' or '.join(COLUMNS)}, only {', '.join(names) or 'none'}")
