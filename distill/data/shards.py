"""Rows of tensors in a folder: files of bounded size that grow under an index, and the reader of a whole folder.

A cache that is being written has an index of its own name; the index takes its final name last, so a folder with a
manifest is whole. It says what the rows were made with, and what each file's bytes must add up to. What prompts and
real images are kept in differs by its `Layout` alone.
"""

import hashlib
import json
import os
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
from distill.files import sha256
from distill.models.device import to_device
from distill.models.sd3_folder import SD3Folder
from distill.training import checkpoint

FORMAT = 2
SHARD_ROWS = 4096
SHARD_BYTES = 1 << 30  # a prompt of a model with T5 takes megabytes, and a shard is built in memory
RESIDENT_BYTES = 1 << 30  # of all rows of a cache, up to which a reader holds them in memory


@dataclass(frozen=True)
class Layout:
    """What a cache holds: a `noun` for a row, the `verb` that makes it of a `source`, its shapes by tensor."""

    noun: str
    verb: str
    source: str
    manifest: str  # the index of a whole cache
    shapes: Mapping[str, tuple[int, ...]]
    teacher: SD3Folder

    @property
    def unfinished(self) -> str:
        """The index while shards are still being added."""
        return f"{Path(self.manifest).stem}.unfinished.json"

    @property
    def begun(self) -> str:
        """An empty file, which marks the folder until the cache is whole."""
        return f".{Path(self.manifest).stem}.begun"

    @property
    def pinned(self) -> dict[str, Any]:
        """What rows are made with, and without which they are of no use."""
        return {
            "format": FORMAT,
            "teacher_digest": self.teacher.digest,
            "clip_length": self.teacher.clip_length,
            "max_sequence_length": self.teacher.max_sequence_length,
        }

    def damaged(self, path: Path) -> CacheError:
        """The error of a file that is not what was written."""
        return CacheError(f"{path} is damaged; remove {path.parent} and {self.verb} again")


def rows_of_shard(most: int, row: Mapping[str, Tensor]) -> int:
    """How many rows like this one a shard takes: at most `most`, and SHARD_BYTES of them."""
    return max(1, min(most, SHARD_BYTES // sum(tensor.nbytes for tensor in row.values())))


def check_rows(indices: Tensor, count: int) -> None:
    """Raise IndexError unless all indices are those of `count` rows."""
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < count:
        raise IndexError(f"rows {indices.tolist()} of {count}")


def shard_name(number: int) -> str:
    """Of a shard's file, without its ending."""
    return f"shard-{number:05d}"


def write_rows(rows: Mapping[str, Tensor], path: Path) -> None:
    """A file of rows by tensor. Raises what the disk raises."""
    save_file({key: tensor.contiguous() for key, tensor in rows.items()}, path)


class Source(Protocol):
    """What rows are made of, read in order; it knows how much was read, and what that was."""

    @property
    def read(self) -> int: ...

    @property
    def sha256(self) -> str: ...

    def skip(self, count: int) -> None: ...


class ShardWriter:
    """Adds shards to a cache, from where a killed call left it; `counts` are metrics that the index keeps."""

    def __init__(self, folder: Path, layout: Layout, dtype: torch.dtype, source: Source, counts: Set[str]) -> None:
        """Open the folder, and pass over what its shards were made of.

        Raises CacheError when it holds a whole cache already, was begun with another source, teacher, dtype or
        format, lacks a file that its index names, or the disk refuses; OutputError when it holds files of no cache that
        a cache would replace.
        """
        if (folder / layout.manifest).exists():
            raise CacheError(f"{folder} holds {layout.noun}s already; remove it or give another folder")
        self._folder, self._layout, self._source = folder, layout, source
        self._index = self._begun(str(dtype).removeprefix("torch."), counts)
        source.skip(self._index["source"]["read"])
        if self._index["source"] != self.read_so_far():
            raise CacheError(
                f"{folder} was begun with other {layout.source}; give those again, or remove it to begin anew"
            )
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._claim()

    def count(self, name: str) -> int:
        """A figure, as the last shard left it."""
        return int(self._index[name])

    @property
    def shards(self) -> int:
        """How many there are."""
        return len(self._index["shards"])

    def partial(self, name: str) -> Path:
        """Where another process writes the rows of a file that is yet to be added."""
        return self._folder / f".{name}.safetensors.partial"

    def add(
        self,
        rows: Mapping[str, Tensor] | Path,
        lines: Mapping[str, Sequence[Any]],
        read: Mapping[str, Any] | None = None,
        /,
        **counts: int,
    ) -> None:
        """Keep rows, or a `partial` file of them, as the next shard, and lines of JSON, for people, in files beside it.

        `read` is what `read_so_far` said when the rows had been read; None is now.
        """
        with self._writing():
            self._index["shards"].append(self._save(shard_name(self.shards), rows))
            self._keep(lines, counts, read)

    def finish(
        self, files: Mapping[str, Mapping[str, Tensor] | Path], lines: Mapping[str, Sequence[Any]], **counts: int
    ) -> None:
        """Keep further tensors, each group in a file of its name, and make the index final."""
        with self._writing():
            for name, rows in files.items():
                self._index[name] = self._save(name, rows)
            self._keep(lines, counts)
            (self._folder / self._layout.unfinished).replace(self._folder / self._layout.manifest)
            (self._folder / self._layout.begun).unlink()
            checkpoint.flush(self._folder)

    def _claim(self) -> None:
        """Mark the folder as a cache. Raises OutputError if a cache would replace files that do not belong to one.

        A call that is killed before its first index leaves files under the mark.
        """
        mark = self._folder / self._layout.begun
        if not (mark.exists() or (self._folder / self._layout.unfinished).exists()):
            others = sorted((*self._folder.glob("*.safetensors"), *self._folder.glob("*.jsonl")))
            if others:
                raise OutputError(f"{others[0]} is not a part of a cache and could be replaced; give another folder")
        mark.touch()

    def _begun(self, dtype: str, counts: Set[str]) -> dict[str, Any]:
        """The index of the shards that a killed call left, or one of none."""
        layout, path = self._layout, self._folder / self._layout.unfinished
        empty: dict[str, Any] = {
            **layout.pinned,
            "teacher": layout.teacher.name,
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
        """How much of the source has been read, and what that was, as the index keeps it."""
        return {"read": self._source.read, "sha256": self._source.sha256}

    def _keep(
        self,
        lines: Mapping[str, Sequence[Any]],
        counts: Mapping[str, int],
        read: Mapping[str, Any] | None = None,
    ) -> None:
        for name, values in lines.items():
            if not values:
                continue
            at = self._index["lines_bytes"].get(name, 0)
            self._index["lines_bytes"][name] = _append(self._folder / name, at, values)
        self._index.update(counts, source=self.read_so_far() if read is None else read)
        checkpoint.write_aside(self._folder / self._layout.unfinished, json.dumps(self._index, indent=2) + "\n")

    def _save(self, name: str, rows: Mapping[str, Tensor] | Path) -> dict[str, Any]:
        """Write rows whole or not at all, and return their entry in the index."""
        made, path = self.partial(name), self._folder / f"{name}.safetensors"
        if not isinstance(rows, Path):
            write_rows(rows, made)
        with safe_open(made, "pt") as file:
            count = file.get_slice(next(iter(file.keys()))).get_shape()[0]
        checkpoint.flush(made)
        made.replace(path)
        checkpoint.flush(self._folder)
        return {"name": path.name, "rows": count, "sha256": sha256(path)}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what a disk says into our error."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"could not write {self._layout.noun}s to {self._folder}: {error}; "
                "make room and run the same command, whole shards are kept"
            ) from error


def check_source(folder: Path, layout: Layout, source: Source) -> None:
    """Raise CacheError unless this is a complete cache of what the source holds now."""
    index = _read_index(folder / layout.manifest, layout, {"source"})
    source.skip(sys.maxsize)
    if index["source"] != {"read": source.read, "sha256": source.sha256}:
        raise CacheError(
            f"{folder} was made of other {layout.source} than the source holds now; restore the source, or give "
            f"another --out; a run that has no checkpoint yet goes on once {folder} is removed"
        )


class ShardReader:
    """A whole cache, whose rows are read from disk when they are asked for, or held on a device.

    That every shard is there, and of its size, is checked when the cache is opened; its checksum before its first row
    is given out. A large model's cache is terabytes, which no start and no process of many should have to read through.
    """

    def __init__(self, folder: Path, layout: Layout, device: torch.device | None = None) -> None:
        """Open and check; rows of RESIDENT_BYTES or less are held on the `device`, if one is given.

        Raises CacheError for a cache that is partial, damaged, or another teacher's.
        """
        path = folder / layout.manifest
        if not path.exists():
            begun = (folder / layout.unfinished).exists()
            mend = f"{layout.verb} again, which continues it" if begun else f"remove it and {layout.verb} again"
            raise CacheError(f"{folder} is not a whole {layout.noun} cache ({layout.manifest} is missing); {mend}")
        self._path, self._layout = path, layout
        self._index = _read_index(path, layout, {"shards"})
        self._shards = _shards(path, self._index["shards"], layout)
        self._starts = [0, *accumulate(shard.rows for shard in self._shards)]
        self._table: dict[str, Tensor] | None = None
        if device is not None and sum(shard.bytes for shard in self._shards) <= RESIDENT_BYTES:
            whole = [shard.whole() for shard in self._shards]
            self._table = {name: torch.cat([part[name] for part in whole]).to(device) for name in layout.shapes}

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """The rows of some indices (B,) by tensor, in that order, where they are held or else on the CPU.

        Raises IndexError for one that is not there, CacheError for one in a damaged shard.
        """
        check_rows(indices, len(self))
        if self._table is not None:
            return {name: held.index_select(0, to_device(indices, held.device)) for name, held in self._table.items()}
        parts = []
        for index in indices.tolist():
            shard = bisect_right(self._starts, index) - 1
            parts.append(self._shards[shard].row(index - self._starts[shard]))
        return {name: torch.cat([part[name] for part in parts]) for name in self._layout.shapes}

    @property
    def sha256(self) -> str:
        """The digest of the cache's source. Raises CacheError if the manifest does not have it."""
        try:
            return str(self._index["source"]["sha256"])
        except (KeyError, TypeError):
            raise self._layout.damaged(self._path) from None

    def only(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file beside the shards.

        Raises CacheError when the cache has none of the name, or it is not what was written.
        """
        try:
            path = self._path.parent / self._index[name]["name"]
            if sha256(path) == self._index[name]["sha256"]:
                return dict(load_file(path))
        except (KeyError, TypeError, OSError, SafetensorError):
            pass
        raise self._layout.damaged(self._path)


class _Shard:
    """A file of rows, of which the header is checked at once and the bytes at the first row."""

    def __init__(self, folder: Path, entry: Mapping[str, Any], layout: Layout) -> None:
        self.rows: int = entry["rows"]
        self._path = folder / entry["name"]
        self._sha256 = entry["sha256"]
        self._layout = layout
        self._checked = False
        expected = {name: [self.rows, *shape] for name, shape in layout.shapes.items()}
        try:
            file: Any = safe_open(self._path, "pt")  # refuses a file that is not as long as its header says
            shapes = {name: file.get_slice(name).get_shape() for name in expected}
        except (OSError, SafetensorError):
            raise self._damaged() from None
        if shapes != expected:
            raise self._damaged()
        self._file = file
        self.bytes = self._path.stat().st_size

    def row(self, row: int) -> dict[str, Tensor]:
        """One row, as a batch, by tensor. Raises CacheError when the file is not what was written."""
        self._check()
        return {name: self._file.get_slice(name)[row : row + 1] for name in self._layout.shapes}

    def whole(self) -> dict[str, Tensor]:
        """All rows by tensor. Raises CacheError when the file is not what was written."""
        self._check()
        return {name: self._file.get_tensor(name) for name in self._layout.shapes}

    def _check(self) -> None:
        """Compare the file's checksum, once."""
        if not self._checked:
            try:
                self._checked = sha256(self._path) == self._sha256
            except OSError:
                raise self._damaged() from None
            if not self._checked:
                raise self._damaged()

    def _damaged(self) -> CacheError:
        mend = f"remove {self._path.parent} and {self._layout.verb} again"
        return CacheError(f"{self._path} is missing or damaged; {mend}")


def _read_index(path: Path, layout: Layout, keys: Set[str]) -> dict[str, Any]:
    """A manifest, or the beginning of one, with at least these keys.

    Raises CacheError when it cannot be read or is not of this teacher.
    """
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        raise layout.damaged(path) from None
    if not isinstance(index, dict):
        raise layout.damaged(path)
    for key, value in layout.pinned.items():
        if index.get(key) != value:
            raise CacheError(
                f"{path.parent} was made for teacher {index.get('teacher')!r} with {key} = {index.get(key)}, "
                f"not {value} of {layout.teacher.name!r}; remove it and {layout.verb} again"
            )
    if not index.keys() >= keys:
        raise layout.damaged(path)
    return index


def _shards(path: Path, entries: Iterable[Mapping[str, Any]], layout: Layout) -> list[_Shard]:
    """The files that the index at `path` names. Raises CacheError when one is not there or its entry is not one."""
    try:
        return [_Shard(path.parent, entry, layout) for entry in entries]
    except (KeyError, TypeError):
        raise layout.damaged(path) from None


def _append(path: Path, at: int, values: Iterable[Any]) -> int:
    """Write lines from a byte on, over what a killed call may have left there, and return where they end."""
    with path.open("r+b" if at else "wb") as file:
        file.truncate(at)
        file.seek(at)
        file.writelines(json.dumps(value).encode() + b"\n" for value in values)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()
