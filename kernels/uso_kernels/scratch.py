"""Memory that an operation needs while it runs, lent by its caller so that it need not be allocated at every call."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Scratch(Protocol):
    """Lends memory whose contents are whatever was last written there."""

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Lend a contiguous tensor.

        Args:
            name: of the memory; whoever borrows it next overwrites it.
            shape: of the tensor.
            like: gives the device, and the dtype where none is named.
            dtype: of the tensor.
        """


def new_memory(name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The `Scratch` that lends nothing twice: a new tensor for every call."""
    return torch.empty(shape, dtype=like.dtype if dtype is None else dtype, device=like.device)
