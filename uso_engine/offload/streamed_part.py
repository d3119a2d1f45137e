"""A part of the engine that is kept in host memory and copied to the GPU for each run: an encoder, the autoencoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .host_copy import HostCopy
from .layer_stream import LayerStream


class StreamedPart:
    """Modules whose layers come one by one, and the rest of them for as long as they run.

    Args:
        modules: all of the part.
        layers: modules inside it that are called in this order, once per run; none: the whole part comes at once.
        device: where it runs.
    """

    def __init__(self, modules: Sequence[nn.Module], layers: Sequence[nn.Module], device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._rest = HostCopy(modules, layers, pinned=self.device.type == "cuda")
        self._stream = LayerStream(layers, device) if layers else None
        self._moved = 0

    @property
    def moved_bytes(self) -> int:
        """Bytes brought to the device so far."""
        return self._moved + (0 if self._stream is None else self._stream.moved_bytes)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep the part on the device, its layers where their turn comes."""
        # An ordinary allocation on the stream that computes: the allocator hands it out again in that stream's order.
        memory = torch.empty(self._rest.size_bytes, dtype=torch.uint8, device=self.device)
        memory.copy_(self._rest.memory, non_blocking=True)
        self._moved += memory.nbytes
        try:
            self._rest.run_from(memory)
            yield
        finally:
            self._rest.rest()
            del memory
            if self._stream is not None:
                self._stream.release()
            if self.device.type == "cuda":
                # What the allocator keeps of this part would stand in the way of the next.
                torch.cuda.empty_cache()

    def remove(self) -> None:
        """Stop streaming layers; everything stays on the host."""
        if self._stream is not None:
            self._stream.remove()
