"""CUDA graphs: a function of tensors recorded once for each shape, so that replaying it costs the CPU one call."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_WARM_UPS = 3  # before recording, for what libraries set up at their first calls
_recording = threading.Lock()  # torch allows one recording of a process at a time


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class Graphed:
    """A function that stays the same but for its arguments' values and for weights that change in place.

    Its recordings share one pool of memory, as no two of them run at once: it is of one thread and stream at a time.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._recordings: dict[tuple[tuple[torch.Size, torch.dtype], ...], _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, *given: Tensor) -> Tensor:
        """What the function gives for tensors on the GPU; a shape that is new is recorded first."""
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in given)
        if shapes not in self._recordings:
            self._recordings[shapes] = self._record(given)
        recording = self._recordings[shapes]
        for mine, theirs in zip(recording.inputs, given, strict=True):
            mine.copy_(theirs)
        recording.graph.replay()
        return recording.output.clone()

    def _record(self, given: tuple[Tensor, ...]) -> _Recording:
        inputs = tuple(tensor.clone() for tensor in given)
        for _ in range(_WARM_UPS):
            self._function(*inputs)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(inputs[0].device)  # type: ignore[no-untyped-call]
        # Other stages go on in their threads meanwhile, and may ask the driver for memory.
        with _recording, torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
            output = self._function(*inputs)
        return _Recording(graph, inputs, output)
