"""The format of caches of encoded rows: a folder of safetensors shards of bounded size, with an index.

While a cache is written, its index has another name; it is renamed last, so a folder with a manifest is complete. The
index records what the rows depend on and a checksum of each file. That of a shard is of its header, which holds
checksums of blocks of rows. So opening a cache reads only its index and headers, whatever its size, and a block is
checked when it is first read. Caches of prompts and of real images differ only in their `Layout`. `shard_writer.py` and
`shard_reader.py` write and read them.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.errors import CacheError
from distill.models.sd3_folder import SD3Folder

FORMAT = 3
SHARD_ROWS = 4096
SHARD_BYTES = 1 << 30  # a shard is built in memory, and a prompt takes megabytes with T5
BLOCK_BYTES = 1 << 24  # rows that share a checksum, and are read from disk together when it is compared


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


def header_checksum(path: Path) -> str:
    """SHA-256 of a safetensors file's header. Raises OSError or struct.error."""
    with path.open("rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(*struct.unpack("<Q", length))).hexdigest()


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
            sound = shapes == expected and header_checksum(self._path) == entry["sha256"]
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


def read_index(path: Path, layout: Layout, keys: Set[str]) -> dict[str, Any]:
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


def open_shards(path: Path, entries: Iterable[Mapping[str, Any]], layout: Layout) -> list[_Shard]:
    """Open the files of the index at `path`. Raises CacheError for a missing file or a damaged entry."""
    try:
        return [_Shard(path.parent, entry, layout) for entry in entries]
    except (KeyError, TypeError):
        raise layout.damaged(path) from None
