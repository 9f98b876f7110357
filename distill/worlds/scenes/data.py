"""Training scenes in chunks: for each scene a few wordings of its prompt, and its pixels.

Several processes render them. A chunk is a pure function of its arguments, so their number changes nothing. This file
imports no torch, so that the processes start fast.
"""

import os
import signal
from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from threading import Thread

import numpy as np
from numpy.typing import NDArray

from distill.errors import CacheError
from distill.worlds.scenes.captions import sample_prompt, wording
from distill.worlds.scenes.render import place, render

CHUNK = 1024  # scenes
WORDINGS = 3  # of each scene's prompt


@dataclass(frozen=True)
class Chunk:
    """`texts` are the wordings, WORDINGS of each scene in turn; `images` are the pixels (n, SIZE, SIZE, 3)."""

    texts: list[str]
    images: NDArray[np.uint8]


def make_chunk(seed: int, index: int, count: int, task_weights: Mapping[str, float]) -> Chunk:
    """The first `count` scenes of a chunk."""
    rng = np.random.default_rng((seed, 1, index))
    texts, scenes = [], []
    for _ in range(count):
        prompt = sample_prompt(rng, task_weights)
        scenes.append(place(prompt, rng))
        texts += [wording(prompt, rng) for _ in range(WORDINGS)]
    return Chunk(texts, render(scenes))


def make_chunks(
    seed: int, count: int, task_weights: Mapping[str, float], processes: int | None = None
) -> Generator[Chunk]:
    """`count` scenes in order; `processes` None takes a process for each core."""
    work = [(seed, i, min(CHUNK, count - start), task_weights) for i, start in enumerate(range(0, count, CHUNK))]
    processes = min(len(work), processes or os.cpu_count() or 1)
    if processes <= 1:
        yield from (make_chunk(*arguments) for arguments in work)
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin)
    try:
        submitted = (pool.submit(make_chunk, *arguments) for arguments in work)
        running = deque(islice(submitted, 2 * processes))  # a bound, since chunks wait in memory for the encoder
        while running:
            yield running.popleft().result()
            running.extend(islice(submitted, 1))
    except BrokenProcessPool as error:
        raise CacheError(
            "a process that renders scenes was killed, perhaps for memory; run the same command again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Leave Ctrl-C to the process that started this one, and end when it ends, also when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
