"""Capturing with `torch.cuda.CUDAGraph`."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

_ONE_AT_A_TIME = threading.Lock()
"""Beginning a capture waits for the device and empties PyTorch's cache, which must not fall into another engine's capture."""


class CudaCaptured:
    """A CUDA graph with the memory pool that its tensors lie in."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    @property
    def size_bytes(self) -> int:
        """Device memory of its pool."""
        pool = self._graph.pool()
        segments = torch.cuda.memory_snapshot()
        return sum(int(segment["total_size"]) for segment in segments if tuple(segment["segment_pool_id"]) == tuple(pool))

    def record(self, compute: Callable[[], Tensor]) -> Tensor:
        """Capture on a stream of its own; other threads go on queueing and allocating meanwhile."""
        with _ONE_AT_A_TIME, torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return compute()

    def replay(self) -> None:
        """Compute it again, on the current stream."""
        self._graph.replay()


class CudaCapturing:
    """Captures what is queued on a GPU."""

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot capture what a device computes, or None."""
        return None if device.type == "cuda" else f"a {device.type.upper()} has no CUDA graphs"

    def capture(self, compute: Callable[[], Tensor]) -> tuple[CudaCaptured, Tensor]:
        """Record what a computation queues, without computing it, in a memory pool of its own.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        captured = CudaCaptured()
        return captured, captured.record(compute)
