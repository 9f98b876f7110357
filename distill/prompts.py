"""Prompt sources: the small world, text, JSON lines, CSV, Parquet, a saved data set or standard input, as iterators.

Nothing here holds a source whole, and a data set that `datasets` saved is read without that library.
"""

import csv
import hashlib
import json
import sys
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from distill.errors import PromptError
from distill.scenes.captions import training_prompts
from distill.spec import read_spec

COLUMNS = ("prompt", "caption", "text")  # names under which a table or JSON object may hold its prompt
SCENES_COUNT = 20_000  # prompts of the small world where no count is given
BLOCK = 1024  # prompts tokenized together


def read_prompts(source: str, count: int | None = None, seed: int = 0) -> Iterator[str]:
    """Prompts of a source, at most `count`: `scenes`, `-` for standard input, a file or the folder of a data set.

    Files are txt, jsonl, csv or parquet; the folder is what `save_to_disk` of `datasets` left. Blank lines are passed
    over. Raises PromptError for a source that is missing, empty, or not what its name says.
    """
    if source == "scenes":
        yield from training_prompts(SCENES_COUNT if count is None else count, seed)
        return
    empty = True
    for prompt in islice(filter(None, map(str.strip, _texts(source))), count):
        empty = False
        yield prompt
    if empty:
        raise _nothing_in(source)


class Distinct:
    """Each different prompt of a source once; counts and digests what has been read of the source.

    `order` has, for each prompt that was read, its number among the different ones.
    """

    def __init__(self, prompts: Iterable[str]) -> None:
        self.order = array("q")
        self._prompts = iter(prompts)
        self._seen: dict[bytes, int] = {}
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        return filter(self._is_new, self._prompts)

    def skip(self, count: int) -> None:
        """Read on by `count` prompts, or to the end."""
        for prompt in islice(self._prompts, count):
            self._is_new(prompt)

    @property
    def read(self) -> int:
        """How many prompts have been read."""
        return len(self.order)

    @property
    def repeated(self) -> int:
        """How many of the prompts read had been read before."""
        return self.read - len(self._seen)

    @property
    def sha256(self) -> str:
        """Of the prompts read, in their order."""
        return self._digest.hexdigest()

    def _is_new(self, prompt: str) -> bool:
        mark, before = _mark(prompt), len(self._seen)
        self._digest.update(mark)
        self.order.append(self._seen.setdefault(mark, before))
        return len(self._seen) > before


@dataclass(frozen=True)
class Spread:
    """How lengths are spread; `over` of them exceed `limit`, where there is one."""

    minimum: int
    median: int
    p95: int
    maximum: int
    limit: int | None
    over: int


@dataclass(frozen=True)
class PromptStats:
    """A source counted. Lengths are those of its different prompts: in characters, then for each tokenizer."""

    prompts: int
    repeated: int
    empty: int
    lengths: dict[str, Spread]


def prompt_stats(source: str, teacher: Path | str | None = None) -> PromptStats:
    """Count a source, in tokens too when a teacher is given.

    Raises PromptError for a source without prompts, TeacherError for a folder that is no teacher.
    """
    tokenizers = {} if teacher is None else _tokenizers(teacher)
    lengths: dict[str, Counter[int]] = {name: Counter() for name in ("characters", *tokenizers)}
    seen: set[bytes] = set()
    prompts = empty = 0
    texts = map(str.strip, training_prompts(SCENES_COUNT, 0) if source == "scenes" else _texts(source))
    while block := list(islice(texts, BLOCK)):
        filled = {text: _mark(text) for text in block if text}
        prompts += sum(map(bool, block))
        empty += block.count("")
        different = [text for text, mark in filled.items() if mark not in seen]
        seen.update(filled.values())
        lengths["characters"].update(map(len, different))
        for name, (tokenizer, _) in tokenizers.items():
            if different:
                lengths[name].update(map(len, tokenizer(different, verbose=False).input_ids))
    if not prompts:
        raise _nothing_in(source)
    limits = {name: limit for name, (_, limit) in tokenizers.items()}
    spreads = {name: _spread(counts, limits.get(name)) for name, counts in lengths.items()}
    return PromptStats(prompts, prompts - len(seen), empty, spreads)


def _spread(counts: Mapping[int, int], limit: int | None) -> Spread:
    """Nearest-rank percentiles of lengths, given how often each occurs."""
    ordered = sorted(counts)
    reached = list(accumulate(counts[length] for length in ordered))

    def percentile(percent: int) -> int:
        return ordered[bisect_left(reached, -(-percent * reached[-1] // 100))]

    over = 0 if limit is None else sum(number for length, number in counts.items() if length > limit)
    return Spread(ordered[0], percentile(50), percentile(95), ordered[-1], limit, over)


def _tokenizers(teacher: Path | str) -> dict[str, tuple[Any, int]]:
    """The tokenizers of a teacher with their limits; its encoders, gigabytes of them, stay on disk."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    spec = read_spec(teacher)
    kinds = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer}
    limits = {"tokenizer": spec.clip_length, "tokenizer_2": spec.clip_length}
    if spec.has_t5 and spec.max_sequence_length > 0:
        kinds["tokenizer_3"], limits["tokenizer_3"] = T5TokenizerFast, spec.max_sequence_length
    return {
        name: (kind.from_pretrained(spec.folder / name, local_files_only=True), limits[name])
        for name, kind in kinds.items()
    }


def _mark(prompt: str) -> bytes:
    """What a prompt is known again by; sixteen bytes, so that tens of millions fit in memory."""
    return hashlib.blake2b(prompt.encode(), digest_size=16).digest()


def _nothing_in(source: str) -> PromptError:
    return PromptError(f"{source} holds no prompts; write one a line")


def _texts(source: str) -> Iterator[str]:
    """Every text of a source, blank ones too."""
    if source == "-":
        yield from _decoded("standard input", sys.stdin.buffer)
        return
    path = Path(source)
    if path.is_dir():
        yield from _saved_dataset(path)
        return
    if not path.is_file():
        raise PromptError(
            f"no prompt file {source}; give a txt, jsonl, csv or parquet file, the folder of a saved data set, "
            "`scenes`, or - for stdin"
        )
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    with path.open("rb") as file:
        lines = _decoded(path, file)
        if path.suffix == ".jsonl":
            for number, line in enumerate(lines, start=1):
                yield _from_json(path, number, line) if line.strip() else ""
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
    rows = csv.reader(lines)
    try:
        names = next(rows, [])
        index = names.index(_column(path, names))
        for row in rows:
            yield row[index] if index < len(row) else ""
    except csv.Error as error:
        raise PromptError(f"{path} line {rows.line_num} is not CSV: {error}; mend it or take it out") from None


def _from_json(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{path} line {number} is not JSON: {error}; mend it or take it out") from None
    text = value[_column(path, list(value))] if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise PromptError(f"{path} line {number} holds no text; write a string or an object with {COLUMNS[0]!r}")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair: an emoji that was cut
        raise PromptError(f"{path} line {number} holds a half of a character; remove it") from None
    return text


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        name = _column(path, file.schema_arrow.names)
        for batch in file.iter_batches(columns=[name]):
            yield from (text or "" for text in batch.column(0).cast(pa.string()).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise PromptError(f"{path} cannot be read as Parquet: {error}; write it anew") from None


def _saved_dataset(folder: Path) -> Iterator[str]:
    """A folder that `save_to_disk` left: state.json names Arrow streams, which are mapped and not loaded."""
    import pyarrow as pa

    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
        raise PromptError(f"{folder} holds splits ({splits}); give the folder of one of them")
    try:
        files = [folder / entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
    except FileNotFoundError:
        raise PromptError(
            f"{folder} is a folder without state.json, so no saved data set; give a file, or what save_to_disk left"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PromptError(f"{folder}/state.json is damaged ({error!r}); save the data set again") from None
    for path in files:
        try:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
                name = _column(path, batches.schema.names)
                for batch in batches:
                    yield from (text or "" for text in batch.column(name).cast(pa.string()).to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise PromptError(f"{path} cannot be read as Arrow ({error}); save the data set again") from None


def _column(path: Path, names: Sequence[str]) -> str:
    for name in COLUMNS:
        if name in names:
            return name
    raise PromptError(f"{path} has no column {' or '.join(COLUMNS)}, only {', '.join(names) or 'none'}; rename one")
