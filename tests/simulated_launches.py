"""Triton's launches on a simulated GPU: every check up to the launch runs, then the reference computes on the same memory.

Like a GPU it gets addresses and nothing else: what lies there is taken to have the shapes that the launch was prepared for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from simulated_device import DeviceFault, SimulatedGPUs, device_of
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from uso_kernels.launch import ALIGNMENT, Launch, TensorDescriptor
from uso_kernels.operation import Operation


@dataclass(frozen=True)
class _Layout:
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        if 0 in self.shape:
            return 0
        return (1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))) * self.dtype.itemsize

    def at(self, address: int) -> Tensor:
        memory = torch._C._construct_storage_from_data_pointer(address, torch.device("cpu"), self.size_bytes)
        return torch.empty(0, dtype=self.dtype).set_(memory, 0, self.shape, self.strides)


class SimulatedKernel:
    """Stands for a Triton function in one launch.

    Args:
        gpus: that it runs on.
        operation: whose launch it is.
        launch: as described.
        operands: that it was described for.
    """

    def __init__(self, gpus: SimulatedGPUs, operation: Operation, launch: Launch, operands: Sequence[Any]) -> None:
        self.arg_names: list[str] = launch.kernel.arg_names  # type: ignore[attr-defined]
        self._gpus, self._operation, self._name = gpus, operation, launch.name
        self._operands = [_Layout(o.dtype, tuple(o.shape), o.stride()) if isinstance(o, Tensor) else o for o in operands]
        self._given = operands

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        assert all(0 < programs < 2**31 for programs in grid) and all(programs < 2**16 for programs in grid[1:])
        return self._first

    def _first(self, *, num_warps: int, num_stages: int, enable_fp_fusion: bool, **arguments: Any) -> dict[Any, Any] | _Any:
        if set(arguments) != set(self.arg_names):
            raise TypeError(f"{self._name}: arguments {sorted(set(arguments) ^ set(self.arg_names))}")
        for name, value in arguments.items():
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            if isinstance(tensor, Tensor) and device_of(tensor) != torch.device("cuda", self._gpus.current):
                raise DeviceFault(f"{self._name}: {name} on {device_of(tensor)}, launched on GPU {self._gpus.current}")
        given = [value for value in self._given if isinstance(value, Tensor)]
        self._compute(self._operands, [value.data_ptr() for value in given])
        names: dict[int, list[int]] = {id(value): [] for value in given}
        for i, name in enumerate(self.arg_names):
            if id(arguments[name]) in names:
                names[id(arguments[name])].append(i)
        places = [names[id(value)][0] if names[id(value)] else None for value in given]
        aligned = [value.data_ptr() % ALIGNMENT == 0 for value in given]
        kept = [None if id(arguments[name]) in names else arguments[name] for name in self.arg_names]
        self._given = ()
        return _Any(lambda *values: self._again(values, kept, places, aligned))

    def _again(self, values: Sequence[Any], kept: Sequence[Any], places: Sequence[int | None], aligned: Sequence[bool]) -> None:
        """A prepared launch: arguments in the kernel's order, operands as addresses or as tensors."""
        if len(values) != len(kept) or any(old is not None and old != new for old, new in zip(kept, values, strict=True)):
            raise DeviceFault(f"{self._name}: a prepared launch got other numbers than it was prepared for")
        addresses = []
        for place, was_aligned in zip(places, aligned, strict=True):
            assert place is not None, f"{self._name}: an operand that no argument of the kernel holds"
            value = values[place]
            addresses.append(value if isinstance(value, int) else value.data_ptr())
            if was_aligned and addresses[-1] % ALIGNMENT:
                raise DeviceFault(f"{self._name}: misaligned address")
        self._compute(self._operands, addresses)

    def _compute(self, operands: Sequence[Any], addresses: Sequence[int]) -> None:
        found = iter(addresses)
        at = [next(found) if isinstance(operand, _Layout) else None for operand in operands]
        stored = [
            self._gpus.memory_at(address, operand.size_bytes)
            for operand, address in zip(operands, at, strict=True)
            if address is not None and operand.size_bytes
        ]
        self._gpus.launches.append(self._name)
        capture = self._gpus.stream().capture

        def run() -> None:
            with _disable_current_modes(), torch.no_grad():
                pairs = zip(operands, at, strict=True)
                self._operation.reference(*(o if a is None else o.at(a) for o, a in pairs))

        if capture is not None:
            capture.writes(stored)
            capture.steps += [lambda: self._check(operands, at), run]
        run()

    def _check(self, operands: Sequence[Any], at: Sequence[int | None]) -> None:
        for operand, address in zip(operands, at, strict=True):
            if address is not None and operand.size_bytes:
                self._gpus.memory_at(address, operand.size_bytes)


class _Any(dict[Any, Any]):
    """A compiled kernel: the same launcher for every grid."""

    def __init__(self, launcher: Callable[..., None]) -> None:
        super().__init__()
        self._launcher = launcher

    def __missing__(self, grid: object) -> Callable[..., None]:
        return self._launcher


def simulated_launch(gpus: SimulatedGPUs, described: Callable[..., Launch]) -> Callable[..., Launch]:
    """`Operation.launch` whose launches run on simulated GPUs."""

    def launch(operation: Operation, generation: Any, *operands: Any) -> Launch:
        made = described(operation, generation, *operands)
        return replace(made, kernel=SimulatedKernel(gpus, operation, made, operands))  # type: ignore[arg-type]

    return launch
