"""A module's tensors in one host buffer, so that bringing them to a device is one copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from uso_engine.errors import MemoryBudgetError

_ALIGNMENT = 256


class _TensorSlot:
    """Where one tensor of a module belongs, and its bytes within the buffer."""

    def __init__(self, owner: nn.Module, name: str, tensor: Tensor, offset: int) -> None:
        self.owner, self.name, self.offset = owner, name, offset
        # Strides too: a decoder's convolutions lie channels last, and have to after every journey.
        self.dtype, self.shape, self.strides, self.size_bytes = tensor.dtype, tensor.shape, tensor.stride(), tensor.nbytes
        self.is_parameter = isinstance(tensor, nn.Parameter)

    @property
    def tensor(self) -> Tensor:
        """What the module has there now."""
        found = getattr(self.owner, self.name)
        assert isinstance(found, Tensor)
        return found

    def view(self, buffer: Tensor) -> Tensor:
        flat = buffer[self.offset : self.offset + self.size_bytes].view(self.dtype)
        return flat.as_strided(self.shape, self.strides)

    def put(self, buffer: Tensor) -> None:
        tensor = self.view(buffer)
        setattr(self.owner, self.name, nn.Parameter(tensor, requires_grad=False) if self.is_parameter else tensor)


class HostCopy:
    """The tensors of some modules, kept on the host; the modules use these while nothing else is put in their place.

    Args:
        modules: whose parameters and buffers are taken, wherever they are now.
        excluded: parts of them that are left alone.
        pinned: whether the buffer is pinned, which copies to a GPU that overlap with its work need.
    """

    def __init__(self, modules: Sequence[nn.Module], excluded: Sequence[nn.Module] = (), *, pinned: bool) -> None:
        left_out = {id(part) for other in excluded for part in other.modules()}
        self._slots: list[_TensorSlot] = []
        tensors: list[Tensor] = []
        # A tensor under two names (T5's embedding) is kept once.
        offsets: dict[int, int] = {}
        end = 0
        for owner, name, tensor in _tensors(modules, left_out):
            if id(tensor) not in offsets:
                offsets[id(tensor)] = end
                end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            self._slots.append(_TensorSlot(owner, name, tensor, offsets[id(tensor)]))
            tensors.append(tensor)
        try:
            self.memory = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            kind = "pinned host memory" if pinned else "host memory"
            raise MemoryBudgetError(f"no {end / 2**30:.2f} GiB of {kind} for weights that find no room on the GPU") from error
        for slot, tensor in zip(self._slots, tensors, strict=True):
            slot.view(self.memory).copy_(tensor)
        self.rest()

    @property
    def size_bytes(self) -> int:
        """Bytes of the buffer."""
        return self.memory.nbytes

    def rest(self) -> None:
        """Let the modules' tensors be those on the host."""
        self.run_from(self.memory)

    def run_from(self, buffer: Tensor) -> None:
        """Let the modules' tensors be those in a copy of the buffer."""
        for slot in self._slots:
            slot.put(buffer)

    def take_over(self) -> None:
        """Copy what others have put into the modules since (other LoRAs, say) into the buffer; to be called at rest."""
        for slot in self._slots:
            here = slot.view(self.memory)
            if slot.tensor.data_ptr() != here.data_ptr():
                here.copy_(slot.tensor)
        self.rest()


def _tensors(modules: Sequence[nn.Module], left_out: set[int]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in modules:
        for part in module.modules():
            if id(part) in left_out:
                continue
            for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                yield part, name, tensor
