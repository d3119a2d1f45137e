"""Capturing with `torch.cuda.CUDAGraph`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

import torch
from torch import Tensor

_ONE_AT_A_TIME = threading.Lock()
"""Beginning a capture waits for the device and empties PyTorch's cache, which must not fall into another engine's capture."""


@lru_cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream that captures on a GPU. PyTorch's own is of the GPU that the process's first capture was on."""
    return torch.cuda.Stream(device)


class CudaCaptured:
    """A CUDA graph with the memory pool that its tensors lie in."""

    def __init__(self) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()

    @property
    def size_bytes(self) -> int:
        """Device memory of its pool."""
        segments = torch.cuda.memory_snapshot()
        return sum(int(segment["total_size"]) for segment in segments if tuple(segment["segment_pool_id"]) == tuple(self._pool))

    def record(self, compute: Callable[[], Tensor]) -> Tensor:
        """Capture on a stream of its own; other threads go on queueing and allocating meanwhile."""
        device = torch.cuda.current_device()
        capture = torch.cuda.graph(self._graph, pool=self._pool, stream=_stream(device), capture_error_mode="thread_local")
        # PyTorch leaves its stream current after a capture that cannot be ended; every later step would be computed on it.
        with _ONE_AT_A_TIME, torch.cuda.stream(torch.cuda.current_stream()):
            try:
                with capture:
                    return compute()
            except BaseException:
                _end_pool(device, self._pool)
                raise

    def replay(self) -> None:
        """Compute it again, on the current stream."""
        self._graph.replay()


def _end_pool(device: int, pool: tuple[int, int]) -> None:
    """Let PyTorch's allocator know that a capture is over, which it does not where the capture could not be ended.

    It refuses to give memory back while it takes a capture to be under way: with an error, and silently where memory runs out.
    """
    with suppress(RuntimeError):  # It knows: what was captured was ended, and failed before or after.
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


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
