"""Prompt embeddings shared by the workers of a server: a prompt that one worker has encoded is not encoded again.

The embeddings lie in memory that every worker maps. The server assigns a slot to each prompt (`EmbeddingAllocator`) and
moves no bytes. A worker reads the embedding from its slot, or encodes the prompt and writes it there
(`SharedEmbeddings`). Each assignment has a new number, which is written last, so an embedding that a worker left half
written when it died is not found.
"""

import itertools
import logging
import os
import struct
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from service.engine import shared_memory

log = logging.getLogger(__name__)

_NUMBER = struct.Struct("<Q")  # of the assignment; aligned, so it is never written in part
_FACTS = struct.Struct("<I?3x")  # tokens of the prompt, whether it was truncated
_HEADER_BYTES = _NUMBER.size + _FACTS.size


class EmbeddingSlot(msgspec.Struct, frozen=True, array_like=True):
    """Where a prompt's embedding belongs."""

    offset: int
    number: int  # of this assignment alone, never 0


@dataclass(eq=False)
class Allocation:
    """A slot that is assigned to a prompt."""

    key: Hashable
    slot: EmbeddingSlot
    begin: int  # in bytes allocated since the start
    batches: int = 0  # in progress, that may read or write it


class EmbeddingAllocator:
    """The server's side: assigns slots in a ring of memory.

    Slots follow each other around the memory, so embeddings of any length leave no gaps, and the oldest are reused
    first. A slot that a batch may still touch is not reused: no more batches get it, and until the last one is answered
    nothing new is allocated.
    """

    def __init__(self, size: int) -> None:
        self._size = size - size % _NUMBER.size
        self._end = 0  # bytes allocated since the start, including those skipped at the end of the memory
        self._allocations: deque[Allocation] = deque()  # oldest first
        self._known: dict[Hashable, Allocation] = {}
        self._numbers = itertools.count(1)

    def allocate(self, key: Hashable, size: int) -> Allocation | None:
        """Return the allocation of an embedding of so many bytes for a batch, or None if there is no room."""
        allocation = self._known.get(key) or self._add(key, size)
        if allocation is not None:
            allocation.batches += 1
        return allocation

    def _add(self, key: Hashable, size: int) -> Allocation | None:
        """Allocate a new slot in place of the oldest ones."""
        if size == 0:
            return None
        size += _HEADER_BYTES
        size += -size % _NUMBER.size
        if size > self._size:
            return None
        begin = self._end
        if begin % self._size + size > self._size:
            begin += -begin % self._size
        while self._allocations and self._allocations[0].begin + self._size < begin + size:
            oldest = self._allocations[0]
            if self._known.get(oldest.key) is oldest:
                del self._known[oldest.key]
            if oldest.batches:
                return None
            self._allocations.popleft()
        self._end = begin + size
        allocation = Allocation(key, EmbeddingSlot(begin % self._size, next(self._numbers)), begin)
        self._allocations.append(allocation)
        self._known[key] = allocation
        return allocation


class SharedEmbeddings:
    """A worker's side: reads and writes the embeddings of a batch's prompts."""

    def __init__(self, memory: int, slots: Mapping[str, EmbeddingSlot]) -> None:
        """`memory` is a descriptor; `slots` are by prompt. Prompts without a slot are not shared."""
        self._memory = memory
        self._slots = slots

    def read(self, prompt: str, row: Any) -> tuple[int, bool] | None:
        """Fill a buffer with an embedding. Returns its tokens and whether it was truncated, or None if it is absent."""
        slot = self._slots.get(prompt)
        if slot is None or not self._is_written(slot):
            return None
        facts = bytearray(_FACTS.size)
        try:
            shared_memory.read(self._memory, memoryview(facts), slot.offset + _NUMBER.size)
            shared_memory.read(self._memory, memoryview(row).cast("B"), slot.offset + _HEADER_BYTES)
        except EOFError:
            return None
        tokens, truncated = _FACTS.unpack(facts)
        return tokens, truncated

    def write(self, prompt: str, row: Any, tokens: int, truncated: bool) -> None:
        """Share an embedding. Two workers may do so at once: equal prompts give equal bytes.

        If it cannot be written completely, other workers encode the prompt again.
        """
        slot = self._slots.get(prompt)
        if slot is None or self._is_written(slot):
            return
        facts = _FACTS.pack(tokens, truncated)
        try:
            shared_memory.write(self._memory, memoryview(facts), slot.offset + _NUMBER.size)
            shared_memory.write(self._memory, memoryview(row).cast("B"), slot.offset + _HEADER_BYTES)
            shared_memory.write(self._memory, memoryview(_NUMBER.pack(slot.number)), slot.offset)
        except OSError as error:
            log.warning("an embedding is not shared: %s", error)

    def _is_written(self, slot: EmbeddingSlot) -> bool:
        return os.pread(self._memory, _NUMBER.size, slot.offset) == _NUMBER.pack(slot.number)


UNSHARED = SharedEmbeddings(-1, {})
