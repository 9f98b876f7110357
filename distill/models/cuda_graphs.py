"""CUDA graphs: a function of tensors is captured once per shape, and each replay is a single launch."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_WARM_UPS = 3  # calls before the capture, in which libraries initialize themselves
_recording = threading.Lock()  # torch allows one capture at a time in a process

_Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class CudaGraphed:
    """A function that is replayed as a CUDA graph. Only its arguments and tensors changed in place may vary.

    The graphs of all shapes share one memory pool, so use an instance from one thread and one stream at a time.
    A function with `effects`, such as a training step, runs exactly once per call: its first calls run without a graph
    and serve as warm-up. Any other function is warmed up and captured in its first call.
    """

    def __init__(self, function: Callable[..., Tensor], effects: bool = False) -> None:
        self._function = function
        self._effects = effects
        self._calls: Counter[_Shapes] = Counter()
        self._recordings: dict[_Shapes, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, *given: Tensor) -> Tensor:
        """Return the function's result for tensors on the GPU; capture a graph first for new shapes."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(given[0].device)  # type: ignore[no-untyped-call]
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in given)
        self._calls[shapes] += 1
        if self._effects and self._calls[shapes] <= _WARM_UPS:
            return self._run_eagerly(self._stream, given)
        if shapes not in self._recordings:
            self._recordings[shapes] = self._record(self._stream, given)
        recording = self._recordings[shapes]
        for static, value in zip(recording.inputs, given, strict=True):
            static.copy_(value)
        recording.graph.replay()
        return recording.output.clone()

    def _run_eagerly(self, stream: torch.cuda.Stream, given: tuple[Tensor, ...]) -> Tensor:
        """Run the function on the stream of the capture, because autograd remembers the stream of each weight."""
        here = torch.cuda.current_stream(stream.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            output = self._function(*given)
        here.wait_stream(stream)
        return output

    def _record(self, stream: torch.cuda.Stream, given: tuple[Tensor, ...]) -> _Recording:
        inputs = tuple(tensor.clone() for tensor in given)
        if not self._effects:
            for _ in range(_WARM_UPS):
                self._function(*inputs)
        graph = torch.cuda.CUDAGraph()
        # Other threads keep running during the capture and may allocate memory.
        with _recording, torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
            output = self._function(*inputs)
        return _Recording(graph, inputs, output)
