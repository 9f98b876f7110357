"""CUDA graphs: a function of tensors recorded once for each shape, so that replaying it costs the CPU one call."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_WARM_UPS = 3  # before recording, for what libraries set up at their first calls
_recording = threading.Lock()  # torch allows one recording of a process at a time

_Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class Graphed:
    """A function that stays the same but for its arguments' values and for tensors that change in place.

    Its recordings share one pool of memory, as no two of them run at once: use it from one thread and one stream at a
    time.
    A function with `effects`, such as a training step, runs exactly once a call: the first calls run without a graph
    and warm up. Any other is warmed up and recorded by its first call.
    """

    def __init__(self, function: Callable[..., Tensor], effects: bool = False) -> None:
        self._function = function
        self._effects = effects
        self._calls: Counter[_Shapes] = Counter()
        self._recordings: dict[_Shapes, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, *given: Tensor) -> Tensor:
        """What the function gives for tensors on the GPU; a shape that is new is recorded first."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(given[0].device)  # type: ignore[no-untyped-call]
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in given)
        self._calls[shapes] += 1
        if self._effects and self._calls[shapes] <= _WARM_UPS:
            return self._aside(self._stream, given)
        if shapes not in self._recordings:
            self._recordings[shapes] = self._record(self._stream, given)
        recording = self._recordings[shapes]
        for mine, theirs in zip(recording.inputs, given, strict=True):
            mine.copy_(theirs)
        recording.graph.replay()
        return recording.output.clone()

    def _aside(self, stream: torch.cuda.Stream, given: tuple[Tensor, ...]) -> Tensor:
        """Run the function on the stream that will record it: autograd remembers the stream of each weight."""
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
        # Other stages go on in their threads meanwhile, and may ask the driver for memory.
        with _recording, torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
            output = self._function(*inputs)
        return _Recording(graph, inputs, output)
