"""Workers as threads of the test's process, with backends of the test."""

import os
import threading
from collections.abc import Sequence

from service.engine import worker
from service.engine.backend import Backend
from service.engine.launch import SharedMemory, Worker, WorkerPool, open_ends
from service.engine.messages import Channel, LoadModel, Profiling, WorkerConfig
from service.engine.worker import Memory, ModelLoader, loader, make_timer


def start_thread(
    name: str, models: Sequence[LoadModel], load: ModelLoader, silence_seconds: float, embeddings: SharedMemory
) -> Worker:
    """Start a worker as a thread of this process."""
    with open_ends() as (ours, theirs, memory):
        end, same = theirs.dup(), os.dup(memory)

        def serve() -> None:
            with end:
                worker.serve(Channel(end), Memory(same, embeddings.descriptor), models, load, make_timer(Profiling()))
            os.close(same)

        threading.Thread(target=serve, name=name, daemon=True).start()
        return Worker(name, ours, memory, None, silence_seconds)


def worker_threads(*backends: Backend, workers: int = 1, device: str = "simulator") -> WorkerPool:
    """Return a pool of worker threads over backends of this process. Models that are loaded later use `device`."""
    given = {backend.info.name: backend for backend in backends}
    others = loader(WorkerConfig(device, ()))
    embeddings = SharedMemory()

    def load(command: LoadModel) -> Backend:
        return others(command) if command.folder is not None or command.name is None else given[command.name]

    def start(models: Sequence[LoadModel]) -> Worker:
        return start_thread("local", models, load, 30.0, embeddings)

    return WorkerPool([start] * workers, [LoadModel(None, name) for name in given])
