"""`CudaGraphEngine` serves an exported model on a GPU with TorchScript and CUDA graphs.

Input: `model.pt`.
Output: an engine that is warmed up and has recorded its graphs.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.runtimes.cuda_graph import WARMUP_CALLS, GraphedFunction
from training.runtimes.engine import Engine
from training.runtimes.torchscript import TorchScriptEngine, to_channels_last

GRAPH_SIZES: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
"""Batch sizes of the CUDA graphs. A GPU takes hardly longer for 32 images than for one."""


class CudaGraphEngine(Engine):
    """TorchScript on a GPU, with one CUDA graph for each of a few batch sizes.

    A batch runs on the graph of the next larger size. A batch larger than the largest size is computed in parts. Images
    and logits pass through pinned memory, and the copies from and to the GPU are part of the graph.

    Args:
        model: An exported `model.pt`.
        dtype: Data type of the activations, a half precision or float32.
    """

    sizes = GRAPH_SIZES

    def __init__(self, model: Path, dtype: torch.dtype = torch.float16):
        self._eager = eager = TorchScriptEngine(model, "cuda", dtype)
        self.name = eager.name
        self.tolerance = eager.tolerance

        def compute(pinned: Tensor) -> Tensor:
            with torch.inference_mode():
                return eager.compute_logits(to_channels_last(pinned.to("cuda", non_blocking=True), dtype))

        self._images = torch.zeros(max(GRAPH_SIZES), 3, 32, 32, dtype=torch.uint8, pin_memory=True)
        self._logits = torch.empty(len(self._images), compute(self._images[:1]).shape[1], pin_memory=True)
        pool = torch.cuda.graph_pool_handle()  # graphs share memory because one runs at a time

        def make_graph(size: int) -> GraphedFunction[Tensor]:
            images, logits = self._images[:size], self._logits[:size]
            return GraphedFunction(lambda: logits.copy_(compute(images), non_blocking=True), pool)

        self._graphs = {size: make_graph(size) for size in sorted(GRAPH_SIZES, reverse=True)}
        for size in self._graphs:
            for _ in range(WARMUP_CALLS + 1):
                self(self._images[:size].numpy())

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute logits, see `Engine`."""
        logits = np.empty((len(images), self._logits.shape[1]), np.float32)
        for start in range(0, len(images), len(self._images)):
            part = slice(start, start + len(self._images))
            self._compute(images[part], logits[part])
        return logits

    def compute_logits(self, images: Tensor) -> Tensor:
        """Compute logits without a graph, see `Engine.compute_logits`."""
        return self._eager.compute_logits(images)

    def _compute(self, images: NDArray[np.uint8], logits: NDArray[np.float32]) -> None:
        """Write the logits of one batch, which is at most as large as the largest graph, into `logits`."""
        count = len(images)
        self._images.numpy()[:count] = images
        with torch.cuda.stream(_serving_stream()):
            self._graphs[min(size for size in GRAPH_SIZES if size >= count)]()
        _serving_stream().synchronize()
        logits[:] = self._logits.numpy()[:count]


@cache
def _serving_stream() -> torch.cuda.Stream:
    """Return the CUDA stream that all engines share, because their graphs may share library workspaces.

    Its high priority lets serving preempt training on the same GPU.
    """
    return torch.cuda.Stream(priority=-1)
