"""Simulated workers that die, stop answering, or return incomplete pixels."""

import asyncio
import os
import random
import signal
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from engines import is_of, is_whole, make, run, value
from worker_threads import start_thread, worker_threads

from service.engine.backend import DeviceLost
from service.engine.embeddings import EmbeddingAllocator
from service.engine.engine import Engine
from service.engine.launch import SharedMemory, Worker, WorkerPool, worker_processes
from service.engine.simulator import Simulator
from service.engine.worker import SLOT_BYTES
from service.engine.worker_handle import connect
from service.errors import StartError
from service.settings import Settings

IMAGE_BYTES = 64 * 64 * 3
TOP_SLOT = 3 * SLOT_BYTES  # where the first batch goes


def test_images_and_new_workers_need_no_thread_of_the_event_loop_s_own_executor():
    pool, done = worker_processes(Settings(engine={"devices": "simulator"})), threading.Event()

    async def test(engine: Engine) -> None:
        busy = [asyncio.create_task(asyncio.to_thread(done.wait)) for _ in range(64)]  # more than it has threads
        try:
            assert is_of(await make(engine, 1), 1)
            os.kill(engine.supervisor.processes[0], signal.SIGKILL)
            assert is_of(await make(engine, 2), 2)
        finally:
            done.set()
            await asyncio.gather(*busy)

    run(pool, test)


def test_workers_killed_at_random_lose_nothing_and_change_nothing():
    pool = worker_processes(Settings(engine={"devices": "simulator", "workers_per_device": 2}))
    chance = random.Random(0)

    async def test(engine: Engine) -> None:
        async def killer() -> None:
            for _ in range(3):
                while not engine.ready:
                    await asyncio.sleep(0.01)
                killed = chance.choice(engine.supervisor.processes)
                os.kill(killed, signal.SIGKILL)
                while killed in engine.supervisor.processes:
                    await asyncio.sleep(0.01)

        async def one(seed: int) -> None:
            assert is_of(await make(engine, seed), seed)

        await asyncio.gather(killer(), *(one(seed) for seed in range(300)))

    metrics = run(pool, test)
    assert value(metrics, "worker_restarts_total", reason="died") == 3


def test_a_pool_that_has_ended_starts_no_workers():
    """This happens if a start is cancelled before its thread begins."""
    pool = worker_processes(Settings(engine={"devices": "simulator"}))
    pool.launch()
    pool.end()
    with pytest.raises(StartError, match="ended while they started"):
        pool.start()


def test_a_worker_ends_also_if_its_server_ends_while_it_is_closed():
    pool, gate = worker_processes(Settings(engine={"devices": "simulator"})), threading.Event()
    (worker,) = pool.start()

    async def close_and_cancel() -> None:
        handle = await connect(worker, EmbeddingAllocator(0), threads)
        closing = asyncio.create_task(handle.close())
        await asyncio.sleep(0)
        closing.cancel()
        with suppress(asyncio.CancelledError):
            await closing
        gate.set()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(gate.wait)  # so that the end of the worker has not begun when it is cancelled
        asyncio.run(close_and_cancel())
    assert worker.process.returncode in (0, -signal.SIGKILL)  # 0 if it noticed first that the connection is closed


def test_a_worker_that_goes_silent_is_replaced():
    pool = worker_processes(Settings(engine={"devices": "simulator"}))

    async def test(engine: Engine) -> None:
        os.kill(engine.supervisor.processes[0], signal.SIGSTOP)
        assert is_of(await make(engine, 3), 3)

    metrics = run(pool, test, engine={"heartbeat_timeout_seconds": 3})
    assert value(metrics, "worker_restarts_total", reason="silent") == 1


@pytest.mark.parametrize("kept", [0, 1, IMAGE_BYTES - 1])
def test_a_worker_whose_pixels_are_not_all_there_is_replaced_and_its_batch_runs_again(kept):
    pool = worker_threads(Simulator(0, 0))
    start = pool.launches[0]
    launched = []

    def cut_off(models):
        worker = start(models)
        launched.append(worker)
        if len(launched) == 1:
            os.close(worker.memory)
            with tempfile.TemporaryFile() as file:
                file.truncate(TOP_SLOT + kept)
                worker.memory = os.dup(file.fileno())
        return worker

    async def test(engine: Engine) -> None:
        assert is_whole(await make(engine, 3), 3)
        assert is_whole(await make(engine, 3), 3)

    metrics = run(WorkerPool([cut_off], pool.models), test)
    assert len(launched) == 2
    assert value(metrics, "worker_restarts_total", reason="incomplete") == 1


def test_draining_waits_for_no_worker_that_is_starting_again():
    class Lost(Simulator):
        def denoise(self, conditions, noise, steps=1):
            if not conditions[0].startswith("warm-up"):
                raise DeviceLost
            return super().denoise(conditions, noise, steps)

    starting, release = threading.Event(), threading.Event()
    backends = iter([Lost(0, 0)])

    def load(order):
        for backend in backends:
            return backend
        starting.set()
        assert release.wait(30)
        return Simulator(0, 0)

    def launch(models) -> Worker:
        return start_thread("slow", models, load, 30, SharedMemory())

    async def test(engine: Engine) -> None:
        losing = asyncio.create_task(make(engine, 1))
        await asyncio.to_thread(starting.wait, 30)
        losing.cancel()
        await asyncio.wait([losing])

    run(WorkerPool([launch], worker_threads(Simulator()).models), test)
    assert not release.is_set()
    release.set()
