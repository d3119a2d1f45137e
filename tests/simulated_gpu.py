"""Operations on simulated GPUs: real numbers, computed on the CPU, and what a GPU would refuse or wait for is found.

A storage belongs to a device. Tensors stay PyTorch's own, so that views, parameters and addresses are what they are; they say
the device of their storage. A mode sees every operation of its thread: it lets operands be of one device only, as CUDA does,
says where the result lies, and notes what makes the host wait. Memory that nobody has written is NaN.

It shows no kernel's own numbers (references compute), no time, and no race between streams (`simulated_streams.py` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from simulated_device import CPU, DeviceFault, SimulatedGPUs, device_of, is_pinned
from simulated_operations import SUBSTITUTES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2", "item"}
"""Operations whose result the host needs."""
INDEXED = {"index": 1, "index_put_": 1, "index_put": 1, "_unsafe_index": 1}
"""Operations whose operand of this number is a list of indices, which may lie on the CPU."""


def poison(tensor: Tensor) -> None:
    """Fill its whole memory with what is NaN in every floating type."""
    torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(255)


class GPUMode(TorchDispatchMode):
    """Sees every operation of the thread that entered it.

    Args:
        gpus: that it computes on.
    """

    def __init__(self, gpus: SimulatedGPUs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpus = gpus

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        asked = kwargs.get("device")
        if name == "is_pinned":
            return is_pinned(tensors[0])
        if name in ("copy_", "_to_copy"):
            device, waits = self._transfer(name, args, kwargs)
        else:
            device = common_device(name, args, tensors)
            waits = name in WAITS and device.type == "cuda"
            waits = waits or _waits_by_operands(name, args, kwargs, device)
        if name not in ("copy_", "_to_copy") and asked is not None:
            device = self.gpus.place(asked)
        if waits:
            self.gpus.wait(name, self.gpus.stream(self._queue_of(tensors, device)))
        pinned = bool(kwargs.get("pin_memory"))
        if asked is not None and device.type == "cuda":
            kwargs["device"] = CPU
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        self._look_at_copies(func, name, args, tensors, device)
        capture = self.gpus.stream(device.index).capture if device.type == "cuda" else None
        if capture is not None:
            capture.before(func, tensors)
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        compute = SUBSTITUTES.get(str(func), func)
        result = compute(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and (made.untyped_storage().data_ptr() not in known or not made.nbytes):
                self._new(made, name, device, pinned=pinned)
        if capture is not None:
            capture.add(compute, args, kwargs, result)
        return result

    def _new(self, made: Tensor, name: str, device: torch.device, *, pinned: bool) -> None:
        self.gpus.own(made, device)
        if device.type == "cuda" and name in UNWRITTEN:
            with _disable_current_modes():
                poison(made)
        if pinned:
            storage: Any = made.untyped_storage()
            storage.pinned, storage.incoming, storage.outgoing = True, set(), set()

    def _queue_of(self, tensors: Sequence[Tensor], device: torch.device) -> int:
        found = [where.index for where in (device, *map(device_of, tensors)) if where.type == "cuda"]
        return found[0] if found else self.gpus.current

    def _transfer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device, bool]:
        """Where a copy's result lies, and whether the host waits for it."""
        if name == "copy_":
            target, source, asynchronous = args[0], args[1], bool((args[2:] or (kwargs.get("non_blocking"),))[0])
            to = device_of(target)
        else:
            target, source, asynchronous = None, args[0], bool(kwargs.get("non_blocking"))
            to = self.gpus.target_of(source)
        start = device_of(source)
        if start == to or {start.type, to.type} == {"cuda"} or (start.type == to.type):
            return to, False
        if not asynchronous:
            return to, True
        host = target if to.type == "cpu" else source
        if host is None or not is_pinned(host):
            if to.type == "cpu":
                return to, True
            raise DeviceFault("a copy from memory that is not pinned is said not to block")
        if target is not None and (target.dtype != source.dtype or target.stride() != source.stride()):
            # PyTorch copies by way of new memory, which is not pinned where it is the host's.
            return to, to.type == "cpu" and not target.is_contiguous()
        return to, False

    def _look_at_copies(
        self, func: Any, name: str, args: tuple[Any, ...], tensors: Sequence[Tensor], device: torch.device
    ) -> None:
        """Find host memory that is read or written while a copy that was said not to block may be under way."""
        queue = self.gpus.stream(self._queue_of(tensors, device))
        crosses = name in ("copy_", "_to_copy") and len({device.type, *(device_of(t).type for t in tensors)}) > 1
        for i, tensor in enumerate(tensors):
            storage: Any = tensor.untyped_storage()
            if not getattr(storage, "pinned", False) or _is_view(func):
                continue
            writes = i == 0 and func._schema.is_mutable
            busy = storage.incoming | (storage.outgoing if writes else set())
            if busy - ({queue} if crosses else set()):
                raise DeviceFault(f"{name} touches host memory that a copy may be under way from or to")
            if crosses:
                (storage.incoming if writes else storage.outgoing).add(queue)
                queue.copies.append(storage)


def _is_view(func: Any) -> bool:
    return any(argument.alias_info is not None and not argument.alias_info.is_write for argument in func._schema.arguments)


def _waits_by_operands(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    if name == "repeat_interleave":
        return isinstance(args[0], Tensor) and kwargs.get("output_size") is None
    if name in INDEXED:
        indices = [index for index in args[INDEXED[name]] if index is not None]
        # A mask is asked where it is true; an index of the host is copied from memory that is not pinned.
        return any(index.dtype in (torch.bool, torch.uint8) or device_of(index) == CPU for index in indices)
    return False


def common_device(name: str, args: tuple[Any, ...], tensors: Sequence[Tensor]) -> torch.device:
    """The device of an operation.

    Raises:
        DeviceFault: its operands lie on several.
    """
    if name in INDEXED:
        free = {id(index) for index in args[INDEXED[name]] if index is not None and device_of(index) == CPU}
        tensors = [tensor for tensor in tensors if id(tensor) not in free]
    places = [(device_of(tensor), tensor.ndim) for tensor in tensors]
    found = {place for place, _ in places if place.type == "cuda"}
    if not found:
        return places[0][0] if places else CPU
    numbers = "cat" not in name and "stack" not in name
    mixed = len(found) > 1 or any(place.type != "cuda" and (ndim or not numbers) for place, ndim in places)
    if mixed:
        raise DeviceFault(f"Expected all tensors to be on the same device, {name} got {[str(place) for place, _ in places]}")
    return found.pop()
