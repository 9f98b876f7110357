"""Caches of encoded rows: a folder of safetensors shards of bounded size with an index, its writer and its reader.

While a cache is written, its index has another name; it is renamed last, so a folder with a manifest is complete. The
index records what the rows depend on and a checksum of each file. That of a shard is of its header, which holds
checksums of blocks of rows. So opening a cache reads only its index and headers, whatever its size, and a block is
checked when it is first read. Caches of prompts and of real images differ only in their `Layout`.
"""

import hashlib
import json
import os
import struct
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.errors import CacheError, OutputError
from distill.files import atomic_write_text, flush, sha256
from distill.models.device import to_device
from distill.models.sd3_folder import SD3Folder

FORMAT = 3
SHARD_ROWS = 4096
SHARD_BYTES = 1 << 30  # a shard is built in memory, and a prompt takes megabytes with T5
BLOCK_BYTES = 1 << 24  # rows that share a checksum, and are read from disk together when it is compared
# The largest cache that a reader loads to memory. It is the same on every machine, because the order of rows depends
# on it, and so small that every process of a run has room for a copy on its device.
RESIDENT_BYTES = 1 << 30
WINDOW_BYTES = 4 << 30  # shards whose rows are shuffled together, so that the system's page cache can hold them


@dataclass(frozen=True)
class Layout:
    """A kind of cache: the `noun` of a row, the `verb` that encodes a `source`, and a row's shapes by tensor."""

    noun: str
    verb: str
    source: str
    manifest: str  # the index of a complete cache
    shapes: Mapping[str, tuple[int, ...]]
    teacher: SD3Folder

    @property
    def unfinished(self) -> str:
        """Name of the index while shards are added."""
        return f"{Path(self.manifest).stem}.unfinished.json"

    @property
    def begun(self) -> str:
        """Name of an empty file that marks the folder until the cache is complete."""
        return f".{Path(self.manifest).stem}.begun"

    @property
    def cache_key(self) -> dict[str, Any]:
        """The cache key: what encoded rows depend on."""
        return {
            "format": FORMAT,
            "teacher_digest": self.teacher.digest,
            "clip_length": self.teacher.clip_length,
            "max_sequence_length": self.teacher.max_sequence_length,
        }

    def damaged(self, path: Path) -> CacheError:
        """The error of a file that differs from what was written."""
        return CacheError(f"{path} is missing or damaged; remove {path.parent} and {self.verb} again")


def rows_of_shard(most: int, row: Mapping[str, Tensor]) -> int:
    """Rows per shard: at most `most`, and SHARD_BYTES in all."""
    return max(1, min(most, SHARD_BYTES // sum(tensor.nbytes for tensor in row.values())))


def check_rows(indices: Tensor, count: int) -> None:
    """Raise IndexError unless all indices are within `count` rows."""
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < count:
        raise IndexError(f"rows {indices.tolist()} of {count}")


def shard_name(number: int) -> str:
    """A shard's file name, without its ending."""
    return f"shard-{number:05d}"


def write_rows(rows: Mapping[str, Tensor], path: Path) -> None:
    """Write a file of rows by tensor, with checksums of its blocks. Raises OSError or SafetensorError."""
    rows = {key: tensor.contiguous() for key, tensor in rows.items()}
    count = len(next(iter(rows.values())))
    block = max(1, BLOCK_BYTES * count // max(1, sum(tensor.nbytes for tensor in rows.values())))
    checksums = [
        _checksum({key: tensor[start : start + block] for key, tensor in rows.items()})
        for start in range(0, count, block)
    ]
    save_file(rows, path, {"blocks": json.dumps({"rows": block, "sha256": checksums})})


def _checksum(rows: Mapping[str, Tensor]) -> str:
    """SHA-256 of the bytes of some rows, tensor by tensor."""
    digest = hashlib.sha256()
    for _, tensor in sorted(rows.items()):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _header_checksum(path: Path) -> str:
    """SHA-256 of a safetensors file's header. Raises OSError or struct.error."""
    with path.open("rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(*struct.unpack("<Q", length))).hexdigest()


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
            entry = {"name": path.name, "rows": count, "sha256": _header_checksum(path)}
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
            (self._folder / self._layout.unfinished).replace(self._folder / self._layout.manifest)
            (self._folder / self._layout.begun).unlink()
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
        index = _read_index(path, layout, empty.keys())
        if index["dtype"] != dtype:
            raise CacheError(
                f"{self._folder} was begun in {index['dtype']}, and this device computes in {dtype}; go on with the "
                f"device that it was begun on, or remove it and {layout.verb} again"
            )
        for name, size in index["lines_bytes"].items():
            lines = self._folder / name
            if not lines.exists() or lines.stat().st_size < size:
                raise CacheError(f"{lines} is missing or cut off; remove {self._folder} and {layout.verb} again")
        _shards(path, index["shards"], layout)
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
    index = _read_index(folder / layout.manifest, layout, {"source"})
    source.skip(sys.maxsize)
    if index["source"] != {"read": source.read, "sha256": source.sha256}:
        raise CacheError(
            f"{folder} was made of other {layout.source} than the source holds now; restore the source, or give "
            f"another --out; a run that has no checkpoint yet goes on once {folder} is removed"
        )


class ShardReader:
    """A complete cache; rows are read from disk on demand, or loaded to a device at once.

    Opening reads the index and the header of every shard, but no rows: the cache of a large model has terabytes. The
    checksum of a block of rows is compared before the first of its rows is returned.
    """

    def __init__(self, folder: Path, layout: Layout, device: torch.device | None = None) -> None:
        """Open and check; a cache of RESIDENT_BYTES or less is loaded to the `device`, if one is given.

        Raises CacheError for a cache that is incomplete, damaged, or of another teacher.
        """
        path = folder / layout.manifest
        if not path.exists():
            begun = (folder / layout.unfinished).exists()
            mend = f"{layout.verb} again, which continues it" if begun else f"remove it and {layout.verb} again"
            raise CacheError(f"{folder} is not a complete {layout.noun} cache ({layout.manifest} is missing); {mend}")
        self._path, self._layout = path, layout
        self._index = _read_index(path, layout, {"shards"})
        self._shards = _shards(path, self._index["shards"], layout)
        self._starts = [0, *accumulate(shard.rows for shard in self._shards)]
        self._table: dict[str, Tensor] | None = None
        self._is_small = sum(shard.bytes for shard in self._shards) <= RESIDENT_BYTES
        if device is not None and self._is_small:
            parts = [shard.read(0, shard.rows) for shard in self._shards]
            self._table = {name: torch.cat([part[name] for part in parts]).to(device) for name in layout.shapes}

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """Read the rows at indices (B,) by tensor. Raises IndexError, and CacheError for a damaged shard."""
        check_rows(indices, len(self))
        if self._table is not None:
            return {name: held.index_select(0, to_device(indices, held.device)) for name, held in self._table.items()}
        parts = []
        for index in indices.tolist():
            shard = bisect_right(self._starts, index) - 1
            row = index - self._starts[shard]
            parts.append(self._shards[shard].read(row, row + 1))
        return {name: torch.cat([part[name] for part in parts]) for name in self._layout.shapes}

    def shuffle(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Shuffle the positions of `rows` (N,), which are row indices; returns a permutation of range(N).

        All positions are shuffled for a cache that fits in memory. Otherwise the shards are shuffled and divided into
        windows of about WINDOW_BYTES, and positions are shuffled within each window, so that the disk is read shard by
        shard.
        """
        permutation = torch.randperm(len(rows), generator=generator)
        if self._is_small:
            return permutation
        shards = torch.randperm(len(self._shards), generator=generator)
        sizes = torch.tensor([shard.bytes for shard in self._shards])
        window_of_shard = torch.empty_like(shards)
        window_of_shard[shards] = (sizes[shards].cumsum(0) - 1) // WINDOW_BYTES
        shard_of_row = torch.searchsorted(torch.tensor(self._starts), rows[permutation], right=True) - 1
        return permutation[window_of_shard[shard_of_row].argsort(stable=True)]

    @property
    def sha256(self) -> str:
        """The digest of the cache's source. Raises CacheError if the manifest does not have it."""
        try:
            return str(self._index["source"]["sha256"])
        except (KeyError, TypeError):
            raise self._layout.damaged(self._path) from None

    def extra(self, name: str) -> dict[str, Tensor]:
        """Read the tensors of a file beside the shards. Raises CacheError if it is missing or damaged."""
        try:
            path = self._path.parent / self._index[name]["name"]
            if sha256(path) == self._index[name]["sha256"]:
                return dict(load_file(path))
        except (KeyError, TypeError, OSError, SafetensorError):
            pass
        raise self._layout.damaged(self._path)


class _Shard:
    """A file of rows; its header is checked when it is opened, each block of rows when it is first read."""

    def __init__(self, folder: Path, entry: Mapping[str, Any], layout: Layout) -> None:
        self.rows: int = entry["rows"]
        self._path = folder / entry["name"]
        self._layout = layout
        expected = {name: [self.rows, *shape] for name, shape in layout.shapes.items()}
        try:
            file: Any = safe_open(self._path, "pt")  # refuses a file that is not as long as its header says
            shapes = {name: file.get_slice(name).get_shape() for name in expected}
            sound = shapes == expected and _header_checksum(self._path) == entry["sha256"]
        except (OSError, SafetensorError):
            sound = False
        if not sound:
            raise layout.damaged(self._path)
        self._file = file
        blocks = json.loads(file.metadata()["blocks"])
        self._block_rows: int = blocks["rows"]
        self._unchecked: dict[int, str] = dict(enumerate(blocks["sha256"]))
        self.bytes = self._path.stat().st_size

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """Read a range of rows by tensor. Raises CacheError for a damaged block; its checksum is compared once."""
        size = self._block_rows
        for block in self._unchecked.keys() & set(range(start // size, -(-stop // size))):
            if _checksum(self._slice(block * size, (block + 1) * size)) != self._unchecked.pop(block):
                raise self._layout.damaged(self._path)
        return self._slice(start, stop)

    def _slice(self, start: int, stop: int) -> dict[str, Tensor]:
        return {name: self._file.get_slice(name)[start : min(stop, self.rows)] for name in self._layout.shapes}


def _read_index(path: Path, layout: Layout, keys: Set[str]) -> dict[str, Any]:
    """Read an index with at least these keys. Raises CacheError when it cannot be read or is of another teacher."""
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        raise layout.damaged(path) from None
    if not isinstance(index, dict):
        raise layout.damaged(path)
    for key, value in layout.cache_key.items():
        if index.get(key) != value:
            mend = f"remove it and {layout.verb} again"
            if key == "max_sequence_length":
                mend = f"set prompts.max_sequence_length to {index.get(key)}, or {mend}"
            raise CacheError(
                f"{path.parent} was made for teacher {index.get('teacher')!r} with {key} = {index.get(key)}, "
                f"not {value} of {layout.teacher.reference!r}; {mend}"
            )
    if not index.keys() >= keys:
        raise layout.damaged(path)
    return index


def _shards(path: Path, entries: Iterable[Mapping[str, Any]], layout: Layout) -> list[_Shard]:
    """Open the files of the index at `path`. Raises CacheError for a missing file or a damaged entry."""
    try:
        return [_Shard(path.parent, entry, layout) for entry in entries]
    except (KeyError, TypeError):
        raise layout.damaged(path) from None


def _append(path: Path, at: int, values: Iterable[Any]) -> int:
    """Write lines from a byte offset on, over leftovers of a killed call; returns the offset of their end."""
    with path.open("r+b" if at else "wb") as file:
        file.truncate(at)
        file.seek(at)
        file.writelines(json.dumps(value).encode() + b"\n" for value in values)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()
