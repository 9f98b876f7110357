"""The batching policy, without a clock or a device."""

from concurrent.futures import Future

import pytest

from service.engine.backend import BatchLimits
from service.engine.batcher import Batcher, BatchKey, ImageBatch, Priority, QueuedImage

A, B = BatchKey("a", 64, 64), BatchKey("b", 64, 64)
LIMITS = dict.fromkeys((A, B, A._replace(width=128)), BatchLimits((1,), 8))


def image(key, seed=0, owner="", priority=Priority.INTERACTIVE) -> QueuedImage:
    return QueuedImage(key, "prompt", seed, Future(), owner, priority)


def batcher(max_batch=8, limit=100, owner_limit=100, limits=LIMITS, window=0.0) -> Batcher:
    return Batcher(max_batch, limit, owner_limit, limits, window)


def behind(images: int, key: BatchKey = A) -> list[ImageBatch]:
    """Return a batch that the network computes."""
    return [ImageBatch(key, [image(key)] * images, "full")]


def seeds(batch: ImageBatch | None) -> list[int]:
    return [w.seed for w in batch.images] if batch else []


def drain(queue: Batcher) -> list[list[int]]:
    """Return the seeds of all batches for an idle device."""
    batches = []
    while batch := queue.take(1e9):
        assert {w.key for w in batch.images} == {batch.key}
        batches.append(seeds(batch))
    assert len(queue) == 0
    return batches


def test_the_group_that_has_waited_longest_goes_first_and_in_order():
    queue = batcher(max_batch=3)
    for time, (key, seed) in enumerate([(A, 0), (B, 1), (A, 2), (A, 3), (A, 4)]):
        queue.add(image(key, seed), time)
    assert drain(queue) == [[0, 2, 3], [1], [4]]


def test_a_batch_holds_one_model_and_one_size():
    queue = batcher()
    for i, key in enumerate([A, BatchKey("a", 128, 64), B] * 3):
        queue.add(image(key, i), i)
    assert drain(queue) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_owners_take_turns_whatever_they_have_sent():
    queue = batcher(max_batch=4)
    for seed in range(8):
        queue.add(image(A, seed, "greedy"), seed)
    queue.add(image(A, 100, "modest"), 8)
    queue.add(image(B, 101, "modest"), 9)
    assert drain(queue) == [[0, 100, 1, 2], [101], [3, 4, 5, 6], [7]]


def test_bulk_work_waits_for_interactive_work_and_fills_its_batches_up():
    queue = batcher(max_batch=4)
    for seed in range(3):
        queue.add(image(A, seed, priority=Priority.BULK), 0)
        queue.add(image(B, seed + 10, priority=Priority.BULK), 0)
    queue.add(image(A, 20), 5)
    queue.add(image(A, 21, "other"), 6)
    assert drain(queue) == [[20, 21, 0, 1], [2], [10, 11, 12]]


@pytest.mark.parametrize(("adapter", "order"), [(None, [0, 1, 10, 11, 2, 12]), ("ink", [1, 10, 11, 0, 2, 12])])
def test_bulk_work_of_what_leaves_goes_with_the_interactive(adapter, order):
    queue = batcher(max_batch=1)
    styled = BatchKey("a", 64, 64, "ink", 1.0)
    for seed, key in enumerate([A, styled, B]):
        queue.add(image(key, seed, priority=Priority.BULK), seed)
    for seed in (10, 11):
        queue.add(image(B, seed), seed)
    queue.promote("a", adapter)
    queue.add(image(B, 12, priority=Priority.BULK), 12)
    assert [seed for batch in drain(queue) for seed in batch] == order


def test_a_busy_device_is_given_whole_blocks_and_an_idle_one_what_there_is():
    queue = batcher(max_batch=8, limits={A: BatchLimits((4,), 8)})
    for seed in range(3):
        queue.add(image(A, seed), 0)
    assert queue.take(1, behind(1)) is None
    for seed in range(3, 7):
        queue.add(image(A, seed), 0)
    whole = queue.take(1, behind(1))
    assert (seeds(whole), whole.reason) == ([0, 1, 2, 3], "unpadded")
    rest = queue.take(1)
    assert (seeds(rest), rest.reason) == ([4, 5, 6], "drained")


def test_a_batch_behind_another_one_has_no_padding_and_is_no_smaller():
    queue = batcher(max_batch=8, limits={A: BatchLimits((2, 4, 8), 8)})
    for seed in range(7):
        queue.add(image(A, seed), 0)
    assert len(queue.take(1, behind(1)).images) == 4
    assert queue.take(1, behind(4)) is None  # 3 are left
    assert len(queue.take(1, behind(2)).images) == 2
    assert queue.take(1, behind(1)) is None  # the last one would be padded
    for seed in range(7, 14):
        queue.add(image(A, seed), 1)
    assert len(queue.take(1, behind(100)).images) == 8  # full


def test_a_batch_behind_one_of_another_model_may_be_smaller():
    queue = batcher(max_batch=8, limits={A: BatchLimits((1, 2, 4, 8), 8)})
    queue.add(image(A), 0)
    assert queue.take(1, behind(8)) is None
    assert len(queue.take(1, behind(8, B)).images) == 1


@pytest.mark.parametrize(("sizes", "queued", "count"), [((1, 8), 7, 7), ((1, 8), 1, 1), ((1, 4, 16), 15, 15)])
def test_a_batch_is_padded_rather_than_split_into_much_smaller_ones(sizes, queued, count):
    queue = batcher(max_batch=16, limits={A: BatchLimits(sizes, 16)})
    for seed in range(queued):
        queue.add(image(A, seed), 0)
    assert len(queue.take(1).images) == count


@pytest.mark.parametrize(
    ("sizes", "images", "padded", "unpadded"),
    [((4,), 3, 4, 0), ((4,), 7, 8, 4), ((2, 8), 7, 8, 2), ((2, 8), 13, 16, 10), ((1, 4), 9, 9, 9), ((2,), 0, 0, 0)],
)
def test_numbers_of_images_with_and_without_padding(sizes, images, padded, unpadded):
    limits = BatchLimits(sizes, 100)
    assert (limits.padded(images), limits.unpadded(images)) == (padded, unpadded)


def test_an_idle_worker_waits_for_a_full_batch_within_the_window_only():
    queue = batcher(max_batch=2, window=0.5)
    queue.add(image(A, 0), 10.0)
    assert queue.take(10.4) is None
    assert seeds(queue.take(10.5)) == [0]
    queue.add(image(A, 1), 11.0)
    queue.add(image(A, 2), 11.0)
    full = queue.take(11.0)
    assert (seeds(full), full.reason) == ([1, 2], "full")


def test_the_bounds_count_images_over_all_and_for_each_owner():
    queue = batcher(max_batch=2, limit=4, owner_limit=3)
    for i in range(3):
        queue.add(image(A if i % 2 else B, owner="one"), i)
    for priority in Priority:
        assert queue.missing_room(1, "one", priority) == 1
        assert queue.missing_room(1, "two", priority) == 0
        assert queue.missing_room(3, "two", priority) == 2
    queue.take(9)
    assert queue.missing_room(2, "one", Priority.INTERACTIVE) == 0


def test_bulk_work_takes_no_room_from_interactive_work_whatever_becomes_of_it():
    queue = batcher(limit=4, owner_limit=3)
    bulk = [image(A, seed, "one", Priority.BULK) for seed in range(4)]
    queue.retry(ImageBatch(A, bulk[:2], "retry"))
    for item in bulk[2:]:
        queue.add(item, 0)

    def check() -> None:
        assert queue.missing_room(1, "two", Priority.BULK) == 1
        assert queue.missing_room(3, "one", Priority.INTERACTIVE) == 0
        assert queue.missing_room(4, "one", Priority.INTERACTIVE) == 1

    check()
    queue.promote("a", None)
    check()
    for seed in range(3):
        queue.add(image(A, seed, "one"), 1)
    assert queue.missing_room(1, "one", Priority.INTERACTIVE) == 1
    assert queue.missing_room(1, "two", Priority.INTERACTIVE) == 0
    assert queue.missing_room(1, "two", Priority.BULK) == 4


def test_cancelled_work_is_dropped_and_frees_its_room():
    queue = batcher(limit=4)
    items = [image(A, seed) for seed in range(4)]
    for item in items:
        queue.add(item, 0)
    items[1].reply.cancel()
    items[2].reply.cancel()
    assert queue.drop_cancelled() == 2
    assert queue.missing_room(2, "", Priority.INTERACTIVE) == 0
    assert drain(queue) == [[0, 3]]


def test_retries_go_first_in_their_own_company_without_what_was_cancelled():
    queue = batcher()
    queue.add(image(A, 9), 0)
    failed = ImageBatch(A, [image(A, seed) for seed in range(5)], "full")
    failed.images[0].reply.cancel()
    failed.images[1].reply.cancel()
    for half in failed.halves():
        queue.retry(half)
    assert len(queue) == 4
    assert drain(queue) == [[2, 3, 4], [9]]


@pytest.mark.parametrize(("cap", "sizes"), [(4, [4, 4, 1]), (3, [3, 3, 3]), (0, [1] * 9)])
def test_a_lowered_cap_holds_for_its_size_alone(cap, sizes):
    queue = batcher(max_batch=9)
    queue.lower_cap(A, cap)
    queue.lower_cap(A, 100)  # caps never rise again
    for seed in range(9):
        queue.add(image(A, seed), 0)
    assert [len(batch) for batch in drain(queue)] == sizes
    for seed in range(9):
        queue.add(image(B, seed), 0)
    assert [len(batch) for batch in drain(queue)] == [9]


def test_what_is_ahead_is_counted_by_priority():
    queue = batcher()
    queue.add(image(A, priority=Priority.BULK), 0)
    queue.add(image(A), 0)
    queue.add(image(B), 0)
    assert queue.ahead_of(Priority.INTERACTIVE) == {A: 1, B: 1}
    assert queue.ahead_of(Priority.BULK) == {A: 2, B: 1}
