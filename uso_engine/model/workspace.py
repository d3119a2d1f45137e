"""Buffers that a denoising run writes again and again, so that a step after the first allocates little."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Named buffers of one packed batch.

    Args:
        reuse: hand out the same buffer for the same name and shape; otherwise a new one each time, which is what autograd and
            whoever keeps intermediate tensors need.
    """

    def __init__(self, *, reuse: bool = True) -> None:
        self._reuse = reuse
        self._buffers: dict[str, Tensor] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Hand out a buffer whose contents are whatever was last written.

        Args:
            name: of the buffer; two that are alive at the same time need two names.
            shape: of the buffer; another shape under the same name replaces it.
            like: gives dtype and device.
        """
        if not self._reuse:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape or buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = self._buffers[name] = torch.empty(shape, dtype=like.dtype, device=like.device)
        return buffer
