"""Prompt sources: the small world, text, JSON lines, CSV, Parquet or standard input, to an iterator of str."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from distill.errors import PromptError
from distill.scenes.captions import training_prompts

COLUMNS = ("prompt", "caption", "text")  # names under which a table or JSON object may hold its prompt


def read_prompts(source: str, count: int | None = None, seed: int = 0) -> Iterator[str]:
    """Prompts of a source, at most `count`: `scenes`, `-` for standard input, or a txt, jsonl, csv or parquet file.

    Blank lines are passed over. Raises PromptError for a source that is missing, empty, or not what its name says.
    """
    if source == "scenes":
        yield from training_prompts(20_000 if count is None else count, seed)
        return
    found = 0
    for prompt in _lines(source):
        if prompt.strip():
            found += 1
            yield prompt.strip()
        if found == count:
            return
    if found == 0:
        raise PromptError(f"{source} holds no prompts; write one a line")


def _lines(source: str) -> Iterator[str]:
    if source == "-":
        yield from sys.stdin
        return
    path = Path(source)
    if not path.is_file():
        raise PromptError(f"no prompt file {source}; give a txt, jsonl, csv or parquet file, `scenes`, or - for stdin")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _from_json(path, number, line)
            elif path.suffix == ".csv":
                rows = csv.DictReader(file)
                name = _column(path, rows.fieldnames or [])
                for row in rows:
                    yield row[name] or ""
            else:
                yield from file
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 at byte {error.start}; convert it first") from None


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
    except pa.ArrowInvalid as error:
        raise PromptError(f"{path} is not a Parquet file: {error}") from None
    name = _column(path, file.schema_arrow.names)
    for batch in file.iter_batches(columns=[name]):
        yield from (text or "" for text in batch.column(0).to_pylist())


def _column(path: Path, names: list[str]) -> str:
    for name in COLUMNS:
        if name in names:
            return name
    raise PromptError(f"{path} has no column {' or '.join(COLUMNS)}, only {', '.join(names) or 'none'}")
