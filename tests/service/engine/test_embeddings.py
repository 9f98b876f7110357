"""Where the embeddings of prompts belong in memory that is bounded; test_student has the workers that share it."""

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
        if held := allocator.take(key, size):
            assert held.place.offset + size + HEADER <= 1000
            for other, its in on_the_way:
                assert other is held or not overlap(held.place, size + HEADER, other.place, its + HEADER)
            on_the_way.append((held, size))
            given.add(held.place)
        while len(on_the_way) > chance.randrange(8):
            on_the_way.pop(0)[0].batches -= 1
    assert len(given) > 100
    assert len({place.number for place in given}) == len(given)


def test_the_oldest_go_first_and_what_has_no_room_is_not_kept():
    allocator = EmbeddingAllocator(3 * (16 + HEADER))

    def take(key):
        held = allocator.take(key, 10)
        held.batches -= 1
        return held

    first, second = take("a"), take("b")
    assert take("a") is first
    take("c"), take("d")
    assert take("b") is second
    assert take("a") is not first
    assert allocator.take("large", 3 * 16 + 2 * HEADER + 1) is None
    assert allocator.take("nothing", 0) is None
    busy = allocator.take("c", 10)  # the oldest
    assert allocator.take("e", 10) is None
    busy.batches -= 1
    assert allocator.take("e", 10).place.offset == busy.place.offset


def test_an_embedding_is_found_whole_or_not_at_all():
    memory, allocator = SharedMemory(), EmbeddingAllocator(HEADER + 8)
    place = allocator.take("a", 4).place
    writer, reader = (SharedEmbeddings(memory.descriptor, {"a": place}) for _ in range(2))
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
    memory, place = SharedMemory(), EmbeddingAllocator(HEADER + 8).take("a", 4).place
    shared = SharedEmbeddings(memory.descriptor, {"a": place})
    shared.write("a", b"abcd", 7, True)
    for size in (HEADER + 3, HEADER, HEADER - 1, 8):
        os.ftruncate(memory.descriptor, place.offset + size)
        assert shared.read("a", bytearray(4)) is None


def test_an_embedding_for_which_the_memory_has_no_room_is_not_shared(file_limit):
    memory, place = SharedMemory(), EmbeddingAllocator(HEADER + (1 << 20)).take("a", 1 << 20).place
    shared = SharedEmbeddings(memory.descriptor, {"a": place})
    file_limit(1 << 19)
    shared.write("a", bytes(1 << 20), 7, True)
    file_limit(1 << 30)
    assert shared.read("a", bytearray(1 << 20)) is None
    shared.write("a", bytes(1 << 20), 7, True)
    assert shared.read("a", bytearray(1 << 20)) == (7, True)
