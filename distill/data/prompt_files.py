"""Readers of prompt files: text, JSON, JSON lines, CSV, TSV, Parquet and saved data sets, compressed or not.

The ending of the name, in any letter case, decides the format. An unknown ending is an error, so that no table is read
as plain text.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from distill.errors import PromptError

COLUMNS = ("prompt", "caption", "text")  # columns that may hold the text, in order of preference; case does not matter
EMBEDDED = "embeddings.json"  # the manifest of a cache that `distill embed` made
UNFINISHED = "embeddings.unfinished.json"  # the manifest of an incomplete cache
_TYPES = {bool: "a truth value", int: "a number", float: "a number", dict: "an object", list: "a list"}


def read_texts(source: str, column: str | None = None) -> Iterator[str]:
    """Read all texts, blank ones too, of a file, a folder or `-` (standard input). Raises PromptError."""
    path = Path(source)
    if source == "-":
        yield from _text(Path("standard input"), sys.stdin.buffer, column)
    elif path.is_dir():
        yield from _folder(path, column)
    elif path.exists():  # including a pipe, as in `<(zcat prompts.gz)`
        yield from _file(path, column)
    else:
        raise PromptError(
            f"no prompt file {source}; give a file that ends in {', '.join(FORMATS)}, a folder of them, the folder of "
            "a saved data set, `scenes`, or - for stdin"
        )


def text_of(where: str, row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """Find the first text in some columns of a row; None if all are null. Raises PromptError for other values."""
    blank = None
    for name in columns:
        value = row[name]
        if isinstance(value, list):
            value = next((item for item in value if item not in (None, "")), None)
        if value is None:
            continue
        if not isinstance(value, str):
            raise PromptError(
                f"{where} holds {_kind(value)} as {name!r}, not text; write it as text, or name the "
                "column of the texts by `column`"
            )
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can hold half of a surrogate pair, from an emoji that was cut
            raise PromptError(f"{where} holds a half of a character; remove it") from None
        if value.strip():
            return value
        blank = value
    return blank


def columns_of(where: str, names: Sequence[str], column: str | None = None) -> list[str]:
    """Find the columns with the text: the named one, or those of COLUMNS. Raises PromptError for none or two."""
    found: list[str] = []
    for wanted in COLUMNS if column is None else (column,):
        same = [name for name in names if name == wanted]
        same = same or [name for name in names if name.strip().lower() == wanted.lower()]
        if len(same) > 1:
            raise PromptError(f"{where} has {len(same)} columns called {wanted!r}; rename all but one")
        found += same
    if not found:
        raise PromptError(
            f"{where} has no column {' or '.join(COLUMNS if column is None else (column,))}, only "
            f"{', '.join(names) or 'none'}; name the column of the texts by `column`, or rename it"
        )
    return found


def _kind(value: Any) -> str:
    return _TYPES.get(type(value), f"a {type(value).__name__}")


def _text(path: Path, file: BinaryIO, column: str | None) -> Iterator[str]:
    if column is not None:
        raise PromptError(f"{path} is plain text, which has no column {column!r}; leave the column out")
    for line in _decoded(path, file):
        yield from line.rstrip("\r\n").split("\r")


def _json_lines(path: Path, file: Iterable[bytes], column: str | None) -> Iterator[str]:
    for number, line in enumerate(_decoded(path, file), start=1):
        where = f"{path} line {number}"
        yield _json_row(where, _parsed(where, line), column) if line.strip() else ""


def _json(path: Path, file: BinaryIO, column: str | None) -> Iterator[str]:
    """Read a JSON array as a whole, or else JSON lines, which some libraries write under this ending."""
    data = file.read()
    if data.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"["):
        value = _parsed(str(path), data)
    else:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            yield from _json_lines(path, io.BytesIO(data), column)
            return
    if not isinstance(value, list):
        raise PromptError(
            f"{path} holds {_kind(value)}, not an array; write an array of strings or objects, or name the file "
            ".jsonl if each line is an object"
        )
    for number, row in enumerate(value, start=1):
        yield _json_row(f"{path} item {number}", row, column)


def _json_row(where: str, row: Any, column: str | None) -> str:
    """The text of a string, or of an object's columns; null is blank."""
    if not isinstance(row, dict | str | None):
        raise PromptError(f"{where} holds no text but {_kind(row)}; write a string or an object with {COLUMNS[0]!r}")
    if isinstance(row, dict):
        return text_of(where, row, columns_of(where, list(row), column)) or ""
    return text_of(where, {"": row}, [""]) or ""


def _csv(path: Path, file: BinaryIO, column: str | None, delimiter: str = ",") -> Iterator[str]:
    rows = csv.reader(_decoded(path, file), delimiter=delimiter, strict=True)
    start = 1
    try:
        names = next(rows, [])
        columns = columns_of(str(path), names, column)
        start = rows.line_num + 1
        for row in rows:
            if not any(map(str.strip, row)):
                yield ""
            elif len(row) == len(names):
                yield text_of(f"{path} line {start}", dict(zip(names, row, strict=True)), columns) or ""
            else:
                raise PromptError(
                    f"{path} line {start} has {len(row)} fields, and its header has {len(names)}; put a text that "
                    f"holds {delimiter!r} in double quotes"
                )
            start = rows.line_num + 1
    except csv.Error as error:
        raise PromptError(
            f"{path} line {start} is not CSV: {error}; put texts in double quotes, and double the quotes in them"
        ) from None


def _parquet(path: Path, file: BinaryIO, column: str | None) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        columns = columns_of(str(path), table.schema_arrow.names, column)
        yield from _batches(path, table.iter_batches(columns=columns), columns)
    except pa.ArrowException as error:
        raise PromptError(f"{path} cannot be read as Parquet ({error}); make or fetch it again") from None


def _batches(path: Path, batches: Iterable[Any], columns: Sequence[str]) -> Iterator[str]:
    """The texts of Arrow record batches."""
    import pyarrow as pa

    number = 0
    for batch in batches:
        values = []
        for name in columns:
            found = batch.column(batch.schema.get_field_index(name))
            is_bytes = pa.types.is_binary(found.type) or pa.types.is_large_binary(found.type)
            values.append((found.cast(pa.large_string()) if is_bytes else found).to_pylist())
        for row in zip(*values, strict=True):
            number += 1
            yield text_of(f"{path} row {number}", dict(zip(columns, row, strict=True)), columns) or ""


FORMATS: dict[str, Callable[[Path, BinaryIO, str | None], Iterator[str]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
}


def _zstd(path: Path) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


def _endings(path: Path) -> tuple[str, str]:
    """The endings of a name for its format and compression, in lower case; "" for a missing one."""
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    return (path.with_suffix("") if compression else path).suffix.lower(), compression


def _file(path: Path, column: str | None) -> Iterator[str]:
    """The texts of one file. A file without an ending is plain text."""
    ending, compression = _endings(path)
    if ending and ending not in FORMATS:
        raise PromptError(
            f"{path} ends in {ending}, which is no known format of prompts; use a file that ends in "
            f"{', '.join(FORMATS)}, and name it .txt if it has a prompt on each line"
        )
    if compression and ending == ".parquet":
        raise PromptError(f"{path} is compressed, which is not supported for Parquet; decompress it first")
    read = FORMATS[ending or ".txt"]
    try:
        with COMPRESSIONS[compression](path) if compression else path.open("rb") as file:
            yield from read(path, file, column)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:  # pyarrow raises these too
        what = (ending.removeprefix(".") or "text") + compression
        raise PromptError(f"{path} cannot be read as {what} ({error}); make or fetch it again") from None


def _folder(folder: Path, column: str | None) -> Iterator[str]:
    """A saved data set, or the files of one format in a folder, in the order of their names."""
    if (folder / EMBEDDED).is_file():
        raise PromptError(
            f"{folder} is a cache of encoded prompts; a run takes it as prompts.source, and for anything else give "
            "what it was made of"
        )
    if (folder / UNFINISHED).is_file():
        raise PromptError(f"{folder} is an incomplete cache; run the `distill embed` command that began it again")
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
        raise PromptError(f"{folder} holds splits ({splits}); give the folder of one of them")
    if (folder / "state.json").is_file():
        yield from _saved_dataset(folder, column)
        return
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and _endings(path)[0] in FORMATS:
            files.setdefault(_endings(path)[0], []).append(path)
    if not files:
        raise PromptError(
            f"{folder} holds no prompt files and, without state.json, is no saved data set; give a file that ends in "
            f"{', '.join(FORMATS)}, or a folder of such files"
        )
    if ".parquet" in files:  # other files beside tables describe them
        files = {".parquet": files[".parquet"]}
    if len(files) > 1:
        raise PromptError(f"{folder} holds files of several formats ({', '.join(files)}); give one of the files")
    for path in next(iter(files.values())):
        yield from _file(path, column)


def _saved_dataset(folder: Path, column: str | None) -> Iterator[str]:
    """The texts of a folder written by `save_to_disk`: state.json names Arrow streams, which are memory-mapped."""
    import pyarrow as pa

    try:
        files = [folder / entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PromptError(f"{folder}/state.json is damaged ({error!r}); save the data set again") from None
    for path in files:
        try:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
                columns = columns_of(str(path), batches.schema.names, column)
                yield from _batches(path, batches, columns)
        except (pa.ArrowException, OSError) as error:
            raise PromptError(f"{path} cannot be read as Arrow ({error}); save the data set again") from None


def _decoded(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    """Lines as text, without a byte order mark."""
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:  # UTF-16 without a byte order mark
            raise PromptError(f"{path} line {number} is not UTF-8; convert it first") from None
        yield text


def _parsed(where: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where} is not JSON: {error}; correct it or remove it") from None
