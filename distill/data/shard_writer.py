"""`ShardWriter`: adds rows to a cache shard by shard, so that a killed call is resumed."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.data.shards import Layout, header_checksum, open_shards, read_index, shard_name, write_rows
from distill.errors import CacheError, OutputError
from distill.files import atomic_write_text, flush, make_readable, sha256


class Source(Protocol):
    """The data that rows are made from, read in order, with the count and the digest of what was read."""

    @property
    def read(self) -> int: ...

    @property
    def sha256(self) -> str: ...

    def skip(self, count: int) -> None: ...


class ShardWriter:
    """Adds shards to a cache, or resumes one; `counts` names the counters that the index keeps."""

    def __init__(self, folder: Path, layout: Layout, dtype: torch.dtype, source: Source, counts: Set[str]) -> None:
        """Open the folder, and skip the part of the source that its shards hold.

        Raises CacheError when it holds a complete cache, was begun with another source, teacher, dtype or format, lacks
        a file of its index, or cannot be written; OutputError when it holds other files that a cache could replace.
        """
        if (folder / layout.manifest).exists():
            raise CacheError(f"{folder} holds {layout.noun}s already; remove it or give another folder")
        self._folder, self._layout, self._source = folder, layout, source
        self._index = self._begun(str(dtype).removeprefix("torch."), counts)
        source.skip(self._index["source"]["read"])
        if self._index["source"] != self.read_so_far():
            raise CacheError(
                f"{folder} was begun with other {layout.source}; give those again, or remove it to start over"
            )
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._claim()

    def count(self, name: str) -> int:
        """A counter, as of the last shard."""
        return int(self._index[name])

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self._index["shards"])

    def partial(self, name: str) -> Path:
        """Path to which another process writes the rows of a file that will be added."""
        return self._folder / f".{name}.safetensors.partial"

    def add(
        self,
        rows: Mapping[str, Tensor] | Path,
        lines: Mapping[str, Sequence[Any]],
        read: Mapping[str, Any] | None = None,
        /,
        **counts: int,
    ) -> None:
        """Add rows, or a `partial` file of them, as the next shard, and lines of JSON for people to files beside it.

        `read` is the value of `read_so_far` after the rows were read; None takes the current one.
        """
        with self._writing():
            path, count = self._save(shard_name(self.shards), rows)
            entry = {"name": path.name, "rows": count, "sha256": header_checksum(path)}
            self._index["shards"].append(entry)
            self._keep(lines, counts, read)

    def finish(
        self, files: Mapping[str, Mapping[str, Tensor] | Path], lines: Mapping[str, Sequence[Any]], **counts: int
    ) -> None:
        """Add further tensors, each group in a file of its name, and rename the index to the manifest."""
        with self._writing():
            for name, rows in files.items():
                path, _ = self._save(name, rows)
                self._index[name] = {"name": path.name, "sha256": sha256(path)}
            self._keep(lines, counts)
            (self._folder / self._layout.begun).unlink()  # first, so that a complete cache never has it
            (self._folder / self._layout.unfinished).replace(self._folder / self._layout.manifest)
            flush(self._folder)

    def _claim(self) -> None:
        """Mark the folder as a cache before it has an index. Raises OutputError if it holds files of another kind."""
        mark = self._folder / self._layout.begun
        if not (mark.exists() or (self._folder / self._layout.unfinished).exists()):
            others = sorted((*self._folder.glob("*.safetensors"), *self._folder.glob("*.jsonl")))
            if others:
                raise OutputError(f"{others[0]} is not a part of a cache and could be replaced; give another folder")
        mark.touch()

    def _begun(self, dtype: str, counts: Set[str]) -> dict[str, Any]:
        """Read the index of an incomplete cache, or make an empty one."""
        layout, path = self._layout, self._folder / self._layout.unfinished
        empty: dict[str, Any] = {
            **layout.cache_key,
            "teacher": layout.teacher.reference,
            "t5": layout.teacher.has_t5,
            "dtype": dtype,
            **dict.fromkeys(sorted(counts), 0),
            "source": {"read": 0, "sha256": hashlib.sha256().hexdigest()},
            "lines_bytes": {},
            "shards": [],
        }
        if not path.exists():
            return empty
        index = read_index(path, layout, empty.keys())
        if index["dtype"] != dtype:
            raise CacheError(
                f"{self._folder} was begun in {index['dtype']}, and this device computes in {dtype}; go on with the "
                f"device that it was begun on, or remove it and {layout.verb} again"
            )
        for name, size in index["lines_bytes"].items():
            lines = self._folder / name
            if not lines.exists() or lines.stat().st_size < size:
                raise CacheError(f"{lines} is missing or cut off; remove {self._folder} and {layout.verb} again")
        open_shards(path, index["shards"], layout)
        return index

    def read_so_far(self) -> dict[str, Any]:
        """The count and digest of what was read of the source, as in the index."""
        return {"read": self._source.read, "sha256": self._source.sha256}

    def _keep(
        self, lines: Mapping[str, Sequence[Any]], counts: Mapping[str, int], read: Mapping[str, Any] | None = None
    ) -> None:
        for name, values in lines.items():
            if not values:
                continue
            at = self._index["lines_bytes"].get(name, 0)
            self._index["lines_bytes"][name] = _append(self._folder / name, at, values)
        self._index.update(counts, source=self.read_so_far() if read is None else read)
        atomic_write_text(self._folder / self._layout.unfinished, json.dumps(self._index, indent=2) + "\n")

    def _save(self, name: str, rows: Mapping[str, Tensor] | Path) -> tuple[Path, int]:
        """Write rows atomically; returns their file and number."""
        made, path = self.partial(name), self._folder / f"{name}.safetensors"
        if not isinstance(rows, Path):
            write_rows(rows, made)
        with safe_open(made, "pt") as file:
            count = int(file.get_slice(next(iter(file.keys()))).get_shape()[0])
        make_readable(made)
        flush(made)
        made.replace(path)
        flush(self._folder)
        return path, count

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise errors of the disk as CacheError."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"could not write {self._layout.noun}s to {self._folder}: {error}; "
                "make room and run the same command, complete shards are kept"
            ) from error


def check_source(folder: Path, layout: Layout, source: Source) -> None:
    """Raise CacheError unless this is a complete cache of the source as it is now."""
    index = read_index(folder / layout.manifest, layout, {"source"})
    source.skip(sys.maxsize)
    if index["source"] != {"read": source.read, "sha256": source.sha256}:
        raise CacheError(
            f"{folder} was made of other {layout.source} than the source holds now; restore the source, or give "
            f"another --out; a run that has no checkpoint yet goes on once {folder} is removed"
        )


def _append(path: Path, at: int, values: Iterable[Any]) -> int:
    """Write lines from a byte offset on, over leftovers of a killed call; returns the offset of their end."""
    with path.open("r+b" if at else "wb") as file:
        file.truncate(at)
        file.seek(at)
        file.writelines(json.dumps(value).encode() + b"\n" for value in values)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()
