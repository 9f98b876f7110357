"""The batching policy, without a clock or a device."""

from concurrent.futures import Future

from service.engine.batcher import Batcher, Work

A, B = ("a", 64, 64), ("b", 64, 64)


def work(key, seed=0) -> Work:
    return Work(key, "prompt", seed, Future())


def test_the_group_that_has_waited_longest_goes_first_and_in_order():
    batcher = Batcher(max_batch=3, limit=100)
    for time, (key, seed) in enumerate([(A, 0), (B, 1), (A, 2), (A, 3), (A, 4)]):
        batcher.add(work(key, seed), time)
    taken = [[w.seed for w in batcher.take()] for _ in range(4)]
    assert taken == [[0, 2, 3], [1], [4], []]


def test_a_batch_holds_one_model_and_one_size():
    batcher = Batcher(max_batch=8, limit=100)
    for i, key in enumerate([("a", 64, 64), ("a", 128, 64), ("b", 64, 64)] * 3):
        batcher.add(work(key), i)
    while batch := batcher.take():
        assert len({w.key for w in batch}) == 1
        assert len(batch) == 3


def test_the_bound_counts_images_over_all_groups():
    batcher = Batcher(max_batch=2, limit=4)
    for i in range(3):
        batcher.add(work(A if i % 2 else B), i)
    assert batcher.has_room(1)
    assert not batcher.has_room(2)
    batcher.take()
    assert batcher.has_room(3)


def test_cancelled_work_is_dropped_and_frees_its_room():
    batcher = Batcher(max_batch=4, limit=4)
    items = [work(A, seed) for seed in range(4)]
    for item in items:
        batcher.add(item, 0)
    items[1].reply.cancel()
    items[2].reply.cancel()
    assert batcher.drop_cancelled() == 2
    assert len(batcher) == 2
    assert [w.seed for w in batcher.take()] == [0, 3]
    assert batcher.take() == []
