"""An engine without HTTP, with simulated workers."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import numpy as np

from service.engine.engine import Engine
from service.engine.launch import WorkerPool
from service.engine.request import GenerationRequest
from service.engine.simulator import Simulator
from service.observability.metrics import Metrics
from service.settings import Settings


def run(pool: WorkerPool, test: Callable[[Engine], Awaitable[None]], **settings) -> Metrics:
    """Run a test with an engine that is drained at the end; return its counts."""
    metrics = Metrics()

    async def whole() -> None:
        engine = Engine(pool, Settings(**settings), metrics)
        await engine.start()
        try:
            await asyncio.wait_for(test(engine), 60)
        finally:
            await engine.drain()

    asyncio.run(whole())
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(f"fgm_{name}", labels) or 0.0


async def make(engine: Engine, seed: int, prompt: str = "a", **options):
    (image,) = await make_all(engine, [seed], prompt, **options)
    return image


async def make_all(engine: Engine, seeds, prompt: str = "a", patient: bool = False, **options):
    options = {"model": "simulator", "width": 64, "height": 64, **options}
    return await engine.generate(GenerationRequest(prompt=prompt, seeds=seeds, **options), patient=patient)


def is_of(image, seed: int) -> bool:
    return np.array_equal(image.pixels[0, 0], np.random.default_rng(seed).integers(0, 256, 3, dtype=np.uint8))


def is_whole(image, seed: int) -> bool:
    """Whether every pixel has the color of the seed."""
    return is_of(image, seed) and bool((image.pixels == image.pixels[0, 0]).all())


class Gate(Simulator):
    """Blocks all batches but the warm-up until it is opened, and records them."""

    def __init__(self, **options):
        super().__init__(0, 0, **options)
        self.entered, self.open = threading.Event(), threading.Event()
        self.prompts, self.seeds = [], []
        self.slow = 0.0  # seconds of a batch, the warm-up's too

    def holds(self, prompts, seeds) -> bool:
        """Whether this batch waits."""
        return not prompts[0].startswith("warm-up")

    def denoise(self, conditions, noise, steps=1):
        if self.holds(conditions, noise):
            self.prompts += conditions
            self.seeds += noise[:, 0, 0].tolist()
            self.entered.set()
            assert self.open.wait(60)
        time.sleep(self.slow)
        return super().denoise(conditions, noise, steps)
