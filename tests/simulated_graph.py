"""CUDA graphs of a simulated GPU: what is queued while one is captured is written down, and computed when it is replayed.

A graph knows addresses. What was made during the capture is in its own memory and stays; anything else it finds where it was,
and a replay that finds that gone is a fault, as is a wait for the device while it is captured. What a capture computes along
the way to know shapes is taken back: memory that it wrote to has its old numbers, and the graph's own is NaN until a replay.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from simulated_device import CPU, DeviceFault, SimulatedGPUs, device_of
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Place:
    """Where a tensor lies; keeps only a graph's own memory alive."""

    storage: Callable[[], Any]
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """What is there now."""
        storage = self.storage()
        if storage is None:
            raise DeviceFault("a graph reads or writes memory that was given back since it was captured")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.strides)


class SimulatedGraph:
    """Stands for `torch.cuda.CUDAGraph`.

    Args:
        gpus: whose work it records.
    """

    def __init__(self, gpus: SimulatedGPUs) -> None:
        self._gpus = gpus
        self.pool: list[Any] = []
        """Memory that was handed out while it was captured."""
        self.pool_id: tuple[int, int] | None = None
        self.steps: list[Callable[[], None]] = []
        self._before: dict[int, tuple[Any, Tensor]] = {}
        self._device = -1
        self.forked: list[Any] = []
        self.joined: list[Any] = []
        """Streams that went on behind the one that is captured, and those that it waited for since."""

    def capture_begin(self, pool: tuple[int, int], **options: object) -> None:
        stream = self._gpus.stream()
        if stream is self._gpus.default_streams[self._gpus.current]:
            raise DeviceFault("CUDA graphs must be captured on a non-default stream")
        self.pool_id, self._device = pool, self._gpus.current
        stream.capture = self
        self._gpus.graphs.append(weakref.ref(self))

    def capture_end(self) -> None:
        for stream in (self._gpus.stream(), *self.forked):
            stream.capture = None
        if any(stream not in self.joined for stream in self.forked):
            raise DeviceFault("CUDA error: capturing a stream that others forked from and did not join again")
        with _disable_current_modes():
            for storage, bytes_before in self._before.values():
                _bytes(storage).copy_(bytes_before)
            self._before.clear()
            for storage in self.pool:
                _bytes(storage).fill_(255)

    def replay(self) -> None:
        if self._gpus.current != self._device:
            raise DeviceFault(f"a graph of GPU {self._device} is replayed on GPU {self._gpus.current}")
        with _disable_current_modes(), torch.no_grad():
            for step in self.steps:
                step()

    def writes(self, storages: Sequence[Any]) -> None:
        """Keep the bytes of memory that is not its own and that the capture is about to write to."""
        own = {storage.data_ptr() for storage in self.pool}
        for storage in storages:
            if storage.data_ptr() not in own and storage.data_ptr() not in self._before:
                with _disable_current_modes():
                    self._before[storage.data_ptr()] = storage, _bytes(storage).clone()

    def before(self, func: Any, tensors: Sequence[Tensor]) -> None:
        """An operation is about to be captured."""
        if func._schema.is_mutable:
            self.writes([tensor.untyped_storage() for tensor in tensors if device_of(tensor) != CPU])

    def add(self, compute: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """An operation was captured."""
        own = {storage.data_ptr() for storage in self.pool}

        def placed(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if device_of(leaf) == CPU:
                return leaf.clone()  # A number is an argument of the kernel.
            storage = leaf.untyped_storage()
            at = (lambda: storage) if storage.data_ptr() in own else weakref.ref(storage)
            return Place(at, leaf.dtype, tuple(leaf.shape), leaf.stride(), int(leaf.storage_offset()))

        with _disable_current_modes():
            operands, made = tree_map(placed, (args, kwargs)), tree_map(placed, tree_leaves(result))

        def again() -> None:
            given, named = tree_map(lambda leaf: leaf.tensor() if isinstance(leaf, Place) else leaf, operands)
            for place, new in zip(made, tree_leaves(compute(*given, **named)), strict=True):
                if isinstance(place, Place) and new.data_ptr() != (there := place.tensor()).data_ptr():
                    there.copy_(new)

        if any(isinstance(leaf, Place) for leaf in tree_leaves((operands, made))):
            self.steps.append(again)

    @property
    def size_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.pool)


def _bytes(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
