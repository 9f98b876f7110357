"""The places of prompt embeddings in bounded memory; test_student has the workers that share it."""

import os
import random

import pytest

from service.engine.embeddings import EmbeddingAllocator, SharedEmbeddings
from service.engine.launch import SharedMemory

HEADER = 16  # bytes before an embedding


def overlap(one, size, other, its) -> bool:
    return one.offset < other.offset + its and other.offset < one.offset + size


def test_places_of_batches_on_their_way_are_nobody_elses_and_inside_the_memory():
    chance = random.Random(0)
    allocator, on_the_way, given = EmbeddingAllocator(1000), [], set()
    for _ in range(3000):
        key, size = (number := chance.randrange(30), 1 + number * 7)
        if allocation := allocator.allocate(key, size):
            assert allocation.slot.offset + size + HEADER <= 1000
            for other, its in on_the_way:
                assert other is allocation or not overlap(allocation.slot, size + HEADER, other.slot, its + HEADER)
            on_the_way.append((allocation, size))
            given.add(allocation.slot)
        while len(on_the_way) > chance.randrange(8):
            on_the_way.pop(0)[0].batches -= 1
    assert len(given) > 100
    assert len({slot.number for slot in given}) == len(given)


def test_the_oldest_go_first_and_what_has_no_room_is_not_kept():
    allocator = EmbeddingAllocator(3 * (16 + HEADER))

    def take(key):
        allocation = allocator.allocate(key, 10)
        allocation.batches -= 1
        return allocation

    first, second = take("a"), take("b")
    assert take("a") is first
    take("c"), take("d")
    assert take("b") is second
    assert take("a") is not first
    assert allocator.allocate("large", 3 * 16 + 2 * HEADER + 1) is None
    assert allocator.allocate("nothing", 0) is None
    busy = allocator.allocate("c", 10)  # the oldest
    assert allocator.allocate("e", 10) is None
    busy.batches -= 1
    assert allocator.allocate("e", 10).slot.offset == busy.slot.offset


def test_an_embedding_is_found_whole_or_not_at_all():
    memory, allocator = SharedMemory(), EmbeddingAllocator(HEADER + 8)
    slot = allocator.allocate("a", 4).slot
    writer, reader = (SharedEmbeddings(memory.descriptor, {"a": slot}) for _ in range(2))
    row = bytearray(4)
    assert reader.read("a", row) is None
    with pytest.raises(TypeError):
        writer.write("a", None, 7, True)  # it comes no further, as when its worker is killed
    assert reader.read("a", row) is None
    writer.write("a", b"abcd", 7, True)
    assert (reader.read("a", row), row) == ((7, True), b"abcd")
    writer.write("a", b"efgh", 8, False)  # what is there stays, whoever reads it now
    assert (reader.read("a", row), row) == ((7, True), b"abcd")
    assert reader.read("b", row) is None


def test_an_embedding_that_is_cut_off_is_not_there():
    memory, slot = SharedMemory(), EmbeddingAllocator(HEADER + 8).allocate("a", 4).slot
    shared = SharedEmbeddings(memory.descriptor, {"a": slot})
    shared.write("a", b"abcd", 7, True)
    for size in (HEADER + 3, HEADER, HEADER - 1, 8):
        os.ftruncate(memory.descriptor, slot.offset + size)
        assert shared.read("a", bytearray(4)) is None


def test_an_embedding_for_which_the_memory_has_no_room_is_not_shared(file_limit):
    memory, slot = SharedMemory(), EmbeddingAllocator(HEADER + (1 << 20)).allocate("a", 1 << 20).slot
    shared = SharedEmbeddings(memory.descriptor, {"a": slot})
    file_limit(1 << 19)
    shared.write("a", bytes(1 << 20), 7, True)
    file_limit(1 << 30)
    assert shared.read("a", bytearray(1 << 20)) is None
    shared.write("a", bytes(1 << 20), 7, True)
    assert shared.read("a", bytearray(1 << 20)) == (7, True)
