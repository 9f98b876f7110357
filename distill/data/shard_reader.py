"""`ShardReader`: the rows of a complete cache, read from disk on demand or held on a device."""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distill.data.shards import Layout, check_rows, open_shards, read_index
from distill.errors import CacheError
from distill.files import sha256
from distill.models.device import to_device

# The largest cache that a reader loads to memory. It is the same on every machine, because the order of rows depends
# on it, and so small that every process of a run has room for a copy on its device.
RESIDENT_BYTES = 1 << 30
WINDOW_BYTES = 4 << 30  # shards whose rows are shuffled together, so that the system's page cache can hold them


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
        self._index = read_index(path, layout, {"shards"})
        self._shards = open_shards(path, self._index["shards"], layout)
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
