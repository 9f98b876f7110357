"""Requests, results and failures of batches, without HTTP. Workers are simulators."""

import asyncio
import resource
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from engines import Gate, is_of, is_whole, make, make_all, run, value
from worker_threads import worker_threads

from service.engine.batcher import Priority
from service.engine.engine import Engine
from service.engine.simulator import Simulator
from service.engine.worker import SLOT_BYTES
from service.errors import GenerationFailed, InvalidRequest, Overloaded, TimedOut, Unavailable


def test_only_the_work_at_fault_fails_and_too_little_memory_lowers_the_cap():
    class Small(Simulator):
        calls: ClassVar[list[int]] = []

        def denoise(self, conditions, noise, steps=1):
            self.calls.append(len(noise))
            if len(noise) > 4:
                raise MemoryError
            return super().denoise(conditions, noise, steps)

    async def test(engine: Engine) -> None:
        prompts = ["poison" if seed == 11 else "good" for seed in range(32)]
        asked = (make(engine, seed, prompt) for seed, prompt in enumerate(prompts))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [seed for seed, answer in enumerate(answers) if isinstance(answer, GenerationFailed)] == [11]
        assert all(is_of(answer, seed) for seed, answer in enumerate(answers) if seed != 11)
        small.calls.clear()
        images = await asyncio.gather(*(make(engine, seed) for seed in range(100, 132)))
        assert all(image.pixels.base is None for image in images)  # a cached image keeps no others of its batch
        assert max(small.calls) <= 4

    small = Small(0, 0, fails_on="poison")
    run(worker_threads(small), test)


def test_equal_requests_share_one_image_while_it_is_made_and_after():
    gate = Gate()

    async def test(engine: Engine) -> None:
        first, second = (asyncio.create_task(make(engine, 5)) for _ in range(2))
        await asyncio.sleep(0)
        leaving = asyncio.create_task(make(engine, 5))
        await asyncio.sleep(0)
        leaving.cancel()  # the others still want it
        gate.open.set()
        assert (await first) is (await second)
        again = await make(engine, 5)
        assert again.pixels is (await first).pixels
        assert (again.seconds, {*(await first).seconds}) == ({}, {"queue", "text", "model", "vae"})
        assert (await make(engine, 5, "b")) is not (await first)

    metrics = run(worker_threads(gate), test)
    assert gate.seeds == [5, 5]
    assert value(metrics, "cache_hits_total", cache="in_flight") == 2
    assert value(metrics, "cache_hits_total", cache="result") == 1


def test_images_in_other_steps_are_other_images_and_one_step_models_refuse_them():
    info = replace(Simulator().info, name="any-step", max_steps=4)
    gate = Gate(info=info)

    async def test(engine: Engine) -> None:
        requests = [asyncio.create_task(make(engine, 5, model="any-step", steps=steps)) for steps in (1, 2, 4, 2)]
        await asyncio.sleep(0)
        gate.open.set()
        images = await asyncio.gather(*requests)
        assert [is_of(image, 5 + 10**6 * extra) for image, extra in zip(images, (0, 1, 3, 1), strict=True)] == [
            True
        ] * 4
        for model, steps, message in (
            ("simulator", 2, "one step"),
            ("any-step", 5, "1 to 4"),
            ("any-step", 0, "1 to 4"),
        ):
            with pytest.raises(InvalidRequest, match=message) as caught:
                await make(engine, 5, model=model, steps=steps)
            assert caught.value.param == "steps"

    metrics = run(worker_threads(gate, Simulator(0, 0)), test)
    assert gate.seeds == [5, 5, 5]
    assert value(metrics, "cache_hits_total", cache="in_flight") == 1


def test_what_waits_is_told_in_seconds_and_who_computes_as_a_share():
    gate = Gate()

    async def test(engine: Engine) -> None:
        assert (engine.dispatcher.busy, engine.dispatcher.queue_seconds) == (0, 0)
        work = [asyncio.create_task(make(engine, seed)) for seed in range(6)]
        await asyncio.sleep(0)
        assert engine.dispatcher.busy == 1
        four_wait = engine.dispatcher.queue_seconds  # two are with the worker
        assert four_wait > 0
        work += [asyncio.create_task(make(engine, seed)) for seed in range(6, 10)]
        await asyncio.sleep(0)
        assert engine.dispatcher.queue_seconds == pytest.approx(2 * four_wait)
        gate.open.set()
        await asyncio.gather(*work)
        assert (engine.dispatcher.busy, engine.dispatcher.queue_seconds) == (0, 0)

    run(worker_threads(gate), test, engine={"max_batch": 1})


def test_a_request_that_cannot_be_in_time_is_refused_at_the_door():
    async def test(engine: Engine) -> None:
        waiting = [asyncio.create_task(make(engine, seed)) for seed in range(100)]  # 0.2 s each at first
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await make(engine, 1000, timeout=5)
        assert 5 <= caught.value.retry_after <= 20
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)

    metrics = run(worker_threads(Simulator(0.15, 0.0)), test, engine={"max_batch": 1})
    assert value(metrics, "refusals_total", reason="deadline_unreachable") == 1


def test_a_request_out_of_time_is_answered_so_and_its_work_dropped():
    gate = Gate()

    async def test(engine: Engine) -> None:
        running = asyncio.create_task(make(engine, 0))
        await asyncio.sleep(0)  # it is on the device, and one of the others behind it
        with pytest.raises(TimedOut) as caught:
            # Patient, because a slow machine's first image may take so long that the request is refused at the door.
            await make_all(engine, range(1, 6), "late", timeout=0.05, patient=True)
        assert caught.value.code == "deadline_exceeded"
        gate.open.set()
        assert is_of(await running, 0)

    metrics = run(worker_threads(gate), test, engine={"max_batch": 1})
    assert value(metrics, "dropped_images_total") == 4


def test_ten_times_what_it_can_take_is_refused_and_what_it_took_is_answered():
    async def test(engine: Engine) -> None:
        asked = (make(engine, seed, owner=str(seed % 2)) for seed in range(500))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        made = [is_of(answer, seed) for seed, answer in enumerate(answers) if not isinstance(answer, Overloaded)]
        assert len(made) >= 50
        assert all(made)
        assert len(answers) - len(made) >= 400

    metrics = run(
        worker_threads(Simulator(0.002, 0)), test, engine={"max_queued_images": 50, "max_queued_images_per_key": 30}
    )
    assert value(metrics, "refusals_total", reason="queue_full") >= 400


def test_bulk_work_waits_for_room_and_interactive_requests_find_theirs():
    gate = Gate()

    async def test(engine: Engine) -> None:
        def line(seed: int, owner: str):
            options = {"owner": owner, "priority": Priority.BULK, "timeout": 1000.0, "patient": True}
            return asyncio.create_task(make_all(engine, range(seed, seed + 4), "bulk", **options))

        bulk = [line(100 * owner + 4 * i, f"bulk{owner}") for i in range(10) for owner in range(4)]
        left = [line(1000 + 4 * i, "bulk0") for i in range(5)]
        await asyncio.sleep(0)
        for task in left:
            task.cancel()
        await asyncio.to_thread(gate.entered.wait)
        answers = [asyncio.create_task(make(engine, seed, owner="bulk1")) for seed in range(2000, 2020)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await make(engine, 3000)
        with pytest.raises(Overloaded):
            await make(engine, 3000, priority=Priority.BULK)
        gate.open.set()
        await asyncio.gather(*answers)
        for images in await asyncio.gather(*bulk):
            assert len(images) == 4
        assert all(task.cancelled() for task in left)

    metrics = run(worker_threads(gate), test, engine={"max_batch": 4, "max_queued_images": 20})
    assert value(metrics, "refusals_total", reason="queue_full") == 2
    assert len(gate.seeds) == 40 * 4 + 20
    assert {*range(2000, 2020)} <= {*gate.seeds[:32]}  # before the bulk work that waited


def test_bulk_owners_take_turns_in_front_of_a_full_queue():
    gate = Gate()

    async def test(engine: Engine) -> None:
        def line(seed: int, owner: str):
            options = {"owner": owner, "priority": Priority.BULK, "patient": True}
            return asyncio.create_task(make(engine, seed, **options))

        greedy = [line(seed, "greedy") for seed in range(100)]
        await asyncio.sleep(0)
        modest = [line(seed, "modest") for seed in range(100, 105)]
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(*greedy, *modest)

    run(worker_threads(gate), test, engine={"max_batch": 1, "max_queued_images": 10})
    assert {*range(100, 105)} <= {*gate.seeds[:30]}


def test_bulk_work_that_waits_for_room_ends_when_the_server_drains():
    gate = Gate()

    async def test(engine: Engine) -> None:
        options = {"priority": Priority.BULK, "patient": True}
        lines = [asyncio.create_task(make(engine, seed, **options)) for seed in range(30)]
        await asyncio.sleep(0)
        draining = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        gate.open.set()
        answers = await asyncio.gather(*lines, return_exceptions=True)
        assert sum(isinstance(answer, Unavailable) for answer in answers) >= 30 - 10 - 4
        assert all(is_of(answer, seed) for seed, answer in enumerate(answers) if not isinstance(answer, Unavailable))
        await draining

    run(worker_threads(gate), test, engine={"max_batch": 1, "max_queued_images": 10})


IMAGE_BYTES = 64 * 64 * 3
TOP_SLOT = 3 * SLOT_BYTES  # where the first batch goes


def test_batches_keep_to_what_was_measured_fast_enough():
    class Counting(Simulator):
        sizes: ClassVar[list[int]] = []

        def denoise(self, conditions, noise, steps=1):
            self.sizes.append(len(noise))
            return super().denoise(conditions, noise, steps)

    async def test(engine: Engine) -> None:
        Counting.sizes.clear()
        await asyncio.gather(*(make(engine, seed) for seed in range(40)))
        assert max(Counting.sizes) == 1  # the only one that was timed

    run(worker_threads(Counting(0, 0)), test, engine={"target_p95_seconds": 1})


@pytest.mark.parametrize("room", [IMAGE_BYTES, IMAGE_BYTES + 1, 4 * IMAGE_BYTES - 1])
def test_a_batch_that_the_shared_memory_does_not_take_whole_is_made_in_smaller_ones(file_limit, room):
    async def test(engine: Engine) -> None:
        file_limit(TOP_SLOT + room)
        images = await make_all(engine, range(4))
        assert all(is_whole(image, seed) for seed, image in enumerate(images))

    run(worker_threads(Simulator(0, 0)), test)


def test_an_image_for_which_the_shared_memory_has_no_room_fails_and_is_not_kept(file_limit):
    async def test(engine: Engine) -> None:
        file_limit(TOP_SLOT + IMAGE_BYTES - 1)
        with pytest.raises(GenerationFailed, match="too little memory"):
            await make(engine, 3)
        file_limit(resource.RLIM_INFINITY)
        assert is_whole(await make(engine, 3), 3)

    run(worker_threads(Simulator(0, 0)), test)


@pytest.mark.parametrize("wrong", [lambda p: p[:-1], lambda p: p[:, :-1], lambda p: p.astype(np.float32)])
def test_pixels_of_another_shape_or_kind_than_was_asked_for_are_no_images(wrong):
    class Wrong(Simulator):
        def decode(self, latents):
            return wrong(super().decode(latents)) if 7 in latents else super().decode(latents)

    async def test(engine: Engine) -> None:
        with pytest.raises(GenerationFailed):
            await make(engine, 7)

    run(worker_threads(Wrong(0, 0)), test)
