"""`GraphedFunction` captures a function of GPU tensors as a CUDA graph and replays it.

A small network runs hundreds of short kernels. The CPU needs more time to launch them than the GPU needs to compute
them. A CUDA graph launches all of them at once.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
WARMUP_CALLS = 3  # libraries select algorithms and allocate memory; TorchScript optimizes its graph
_side_stream_lock = threading.Lock()  # one thread at a time uses the side stream, for warm-up calls too


@cache
def _side_stream() -> torch.cuda.Stream:
    """Return the stream of all warm-up calls and captures.

    A function that was warmed up on the main stream cannot be captured later. All functions share this stream, because
    PyTorch has a small pool of streams and reuses them.
    """
    return torch.cuda.Stream()


class GraphedFunction(Generic[Result]):
    """A function that runs eagerly for the first `WARMUP_CALLS` calls and as a replayed CUDA graph afterwards.

    A call whose arguments have other shapes than in the first call runs eagerly.

    Args:
        function: Function of tensors. It must not synchronize with the GPU. It must not depend on changing state except
            its arguments and tensors at fixed addresses.
        pool: Memory pool from `torch.cuda.graph_pool_handle`, shared by graphs that never run concurrently.
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
        """Return the function's result. The next call overwrites a result tensor."""
        shapes = [argument.shape for argument in arguments]
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            return self._call_eagerly(*arguments)
        if self._calls < WARMUP_CALLS:
            self._calls += 1
            return self._call_eagerly(*arguments)
        if self._graph is None:
            self._graph = self._capture(*arguments)
        for captured, argument in zip(self._arguments, arguments, strict=True):
            captured.copy_(argument, non_blocking=True)
        self._graph.replay()
        return self._result

    def _capture(self, *arguments: Tensor) -> torch.cuda.CUDAGraph:
        self._arguments = tuple(argument.clone() for argument in arguments)
        graph = torch.cuda.CUDAGraph()
        with _side_stream_lock, torch.cuda.graph(graph, self._pool, _side_stream(), "thread_local"):
            self._result = self._function(*self._arguments)
        return graph

    def _call_eagerly(self, *arguments: Tensor) -> Result:
        caller, side = torch.cuda.current_stream(), _side_stream()
        with _side_stream_lock:
            side.wait_stream(caller)
            with torch.cuda.stream(side):
                result = self._function(*arguments)
            caller.wait_stream(side)
        return result
