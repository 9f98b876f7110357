"""Prompt embeddings that the workers of a server share: what one has encoded no other encodes again.

They lie in memory that every worker holds. The server says where each prompt's belongs (`Shelf`), and moves no bytes: a
worker that finds it there reads it, one that does not encodes the prompt and leaves it there (`Embeddings`). A place
has a number that nothing before it had, written last, so what a worker that died has left half written is not found.
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

_NUMBER = struct.Struct("<Q")  # the place's: aligned, so that it is never there in part
_FACTS = struct.Struct("<I?3x")  # tokens of the prompt, whether it was cut off
_HEADER_BYTES = _NUMBER.size + _FACTS.size


class EmbeddingSlot(msgspec.Struct, frozen=True, array_like=True):
    """Where a prompt's embedding belongs."""

    offset: int
    number: int  # of this prompt alone, never 0


@dataclass(eq=False)
class Allocation:
    """A place that was given out."""

    key: Hashable
    place: EmbeddingSlot
    begin: int  # on the allocator's endless count of bytes
    batches: int = 0  # on their way that may still read it or write it


class EmbeddingAllocator:
    """The server's side: which place is whose, in memory of so many bytes.

    Places follow each other round the memory, so that embeddings of any length leave no gaps, and the oldest go first.
    One that a batch may still touch is nobody else's: when its turn to go comes, no more batches are given it, and
    until the last is answered nothing new is kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size - size % _NUMBER.size
        self._end = 0  # bytes given out so far, those skipped before the memory's end too
        self._held: deque[Allocation] = deque()  # oldest first
        self._known: dict[Hashable, Allocation] = {}
        self._numbers = itertools.count(1)

    def take(self, key: Hashable, size: int) -> Allocation | None:
        """The place of an embedding of so many bytes, for a batch; None where there is none to be had."""
        held = self._known.get(key) or self._place(key, size)
        if held is not None:
            held.batches += 1
        return held

    def _place(self, key: Hashable, size: int) -> Allocation | None:
        """A new place, where the oldest were."""
        if size == 0:
            return None
        size += _HEADER_BYTES
        size += -size % _NUMBER.size
        if size > self._size:
            return None
        begin = self._end
        if begin % self._size + size > self._size:
            begin += -begin % self._size
        while self._held and self._held[0].begin + self._size < begin + size:
            oldest = self._held[0]
            if self._known.get(oldest.key) is oldest:
                del self._known[oldest.key]
            if oldest.batches:
                return None
            self._held.popleft()
        self._end = begin + size
        held = Allocation(key, EmbeddingSlot(begin % self._size, next(self._numbers)), begin)
        self._held.append(held)
        self._known[key] = held
        return held


class SharedEmbeddings:
    """A worker's side: the embeddings of a batch's prompts, as far as they are there."""

    def __init__(self, memory: int, places: Mapping[str, EmbeddingSlot]) -> None:
        """`memory` is a descriptor; prompts without a place are not kept."""
        self._memory = memory
        self._places = places

    def read(self, prompt: str, row: Any) -> tuple[int, bool] | None:
        """Fill a buffer with a prompt's, and tell its tokens and whether it was cut off; None where it is not there."""
        place = self._places.get(prompt)
        if place is None or not self._holds(place):
            return None
        facts = bytearray(_FACTS.size)
        try:
            shared_memory.read(self._memory, memoryview(facts), place.offset + _NUMBER.size)
            shared_memory.read(self._memory, memoryview(row).cast("B"), place.offset + _HEADER_BYTES)
        except EOFError:
            return None
        tokens, truncated = _FACTS.unpack(facts)
        return tokens, truncated

    def write(self, prompt: str, row: Any, tokens: int, truncated: bool) -> None:
        """Share a prompt's embedding. Two workers may do so at once: in strict mode they write the same bits.

        If it cannot be written completely, other workers encode the prompt again.
        """
        place = self._places.get(prompt)
        if place is None or self._holds(place):
            return
        facts = _FACTS.pack(tokens, truncated)
        try:
            shared_memory.write(self._memory, memoryview(facts), place.offset + _NUMBER.size)
            shared_memory.write(self._memory, memoryview(row).cast("B"), place.offset + _HEADER_BYTES)
            shared_memory.write(self._memory, memoryview(_NUMBER.pack(place.number)), place.offset)
        except OSError as error:
            log.warning("an embedding is not shared: %s", error)

    def _holds(self, place: EmbeddingSlot) -> bool:
        return os.pread(self._memory, _NUMBER.size, place.offset) == _NUMBER.pack(place.number)


UNSHARED = SharedEmbeddings(-1, {})
