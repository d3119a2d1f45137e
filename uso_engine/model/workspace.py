"""Buffers that a denoising run writes again and again, so that a step after the first allocates nothing of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from uso_kernels.scratch import new_memory

WIDE = "wide"
"""Name of the buffer for a product of many columns, until the one kernel that reads it has run."""
NARROW = "narrow"
"""Name of the buffer for rows of the model's width, until the one operation that reads them has run."""


class Workspace:
    """Named memory of one packed batch; its `take` is a `uso_kernels.scratch.Scratch`.

    Args:
        reuse: hand out the same memory for the same name; otherwise new memory each time, which is what autograd and whoever
            keeps intermediate tensors need.
    """

    def __init__(self, *, reuse: bool = True) -> None:
        self._reuse = reuse
        self._memory: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes of all memory."""
        return sum(memory.nbytes for memory in self._memory.values())

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Hand out a contiguous tensor whose contents are whatever was last written.

        Args:
            name: of the memory; two tensors that are alive at the same time need two names. Shapes may differ from call to
                call: each tensor begins where the memory does, which is as large as the largest so far.
            shape: of the tensor.
            like: gives the device, and the dtype where none is named.
            dtype: of the tensor.
        """
        if not self._reuse:
            return new_memory(name, shape, like, dtype)
        key = (name, tuple(shape), like.dtype if dtype is None else dtype)
        view = self._views.get(key)
        if view is None or view.device != like.device:
            view = self._views[key] = self._view(*key, like.device)
        return view

    def _view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size_bytes = torch.Size(shape).numel() * dtype.itemsize
        memory = self._memory.get(name)
        if memory is None or memory.nbytes < size_bytes or memory.device != device:
            # Smaller views of the same name would keep the memory that this one replaces.
            self._views = {key: view for key, view in self._views.items() if key[0] != name}
            self._memory.pop(name, None)
            memory = self._memory[name] = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        return memory[:size_bytes].view(dtype).view(shape)
