"""Training scenes in chunks: the pixels of each scene, and a few wordings of its prompt.

Several processes render chunks. A chunk depends only on its arguments, so the number of processes changes no result.
This file does not import torch, so that the processes start fast.
"""

import os
from collections.abc import Generator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import starmap
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from distill.data.worker_process import follow_parent
from distill.errors import CacheError
from distill.worlds.scenes.captions import Task, sample_prompt, wording
from distill.worlds.scenes.render import place, render

CHUNK = 1024  # scenes
WORDINGS = 3  # of each scene's prompt


@dataclass(frozen=True)
class Chunk:
    """Rendered scenes: `images` (n, SIZE, SIZE, 3), and WORDINGS consecutive `texts` for each."""

    texts: list[str]
    images: NDArray[np.uint8]


def make_chunk(seed: int, index: int, count: int, task_weights: Mapping[Task, float]) -> Chunk:
    """Render the first `count` scenes of a chunk."""
    rng = np.random.default_rng((seed, 1, index))
    texts, scenes = [], []
    for _ in range(count):
        prompt = sample_prompt(rng, task_weights)
        scenes.append(place(prompt, rng))
        texts += [wording(prompt, rng) for _ in range(WORDINGS)]
    return Chunk(texts, render(scenes))


def make_chunks(
    seed: int, count: int, task_weights: Mapping[Task, float], processes: int | None = None
) -> Generator[Chunk]:
    """Render `count` scenes in order, by default with one process per core."""
    work = [(seed, i, min(CHUNK, count - start), task_weights) for i, start in enumerate(range(0, count, CHUNK))]
    processes = min(len(work), processes or os.cpu_count() or 1)
    if processes <= 1:
        yield from starmap(make_chunk, work)
        return
    try:
        with ProcessPoolExecutor(processes, get_context("spawn"), follow_parent) as pool:
            for first in range(0, len(work), 2 * processes):  # bounded, because finished chunks wait in memory
                yield from pool.map(make_chunk, *zip(*work[first : first + 2 * processes], strict=True))
    except BrokenProcessPool as error:
        raise CacheError(
            "a process that renders scenes was killed, possibly out of memory; run the same command again"
        ) from error
