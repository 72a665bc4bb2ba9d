"""A function of tensors on a GPU, recorded once as a CUDA graph and replayed from then on.

A small network is hundreds of short kernels, which a processor takes longer to launch than the GPU to compute; a graph
launches all of them at once.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
WARMUP_CALLS = 3  # libraries choose their algorithms and take their memory; TorchScript optimises itself
_recording = threading.Lock()  # of functions that are called as they are, too: one at a time has the side stream


@cache
def _side_stream() -> torch.cuda.Stream:
    """What runs on the main one could not be recorded later. One for all: PyTorch has few, and gives them out again."""
    return torch.cuda.Stream()


class Recorded(Generic[Result]):
    """Calls a function, the first few times as it is, then by replaying what it did once.

    Args:
        function: of tensors; it must neither wait for the GPU nor depend on anything else that changes, except for
            tensors that stay where they are. Arguments of other shapes than in the first call are passed to it as ever.
        pool: of memory, from `torch.cuda.graph_pool_handle`, for graphs of which one runs at a time.
    """

    def __init__(self, function: Callable[..., Result], pool: Any = None):
        self._function = function
        self._pool = pool
        self._calls = 0
        self._shapes: list[torch.Size] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._arguments: tuple[Tensor, ...] = ()
        self._result: Result

    def __call__(self, *arguments: Tensor) -> Result:
        """The function's result; where that is a tensor, the next call overwrites it."""
        shapes = [argument.shape for argument in arguments]
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            return self._call(*arguments)
        if self._calls < WARMUP_CALLS:
            self._calls += 1
            return self._call(*arguments)
        if self._graph is None:
            self._arguments = tuple(argument.clone() for argument in arguments)
            graph = torch.cuda.CUDAGraph()
            with _recording, torch.cuda.graph(graph, self._pool, _side_stream(), "thread_local"):
                self._result = self._function(*self._arguments)
            self._graph = graph
        for kept, argument in zip(self._arguments, arguments, strict=True):
            kept.copy_(argument, non_blocking=True)
        self._graph.replay()
        return self._result

    def _call(self, *arguments: Tensor) -> Result:
        before, side = torch.cuda.current_stream(), _side_stream()
        with _recording:
            side.wait_stream(before)
            with torch.cuda.stream(side):
                result = self._function(*arguments)
            before.wait_stream(side)
        return result
