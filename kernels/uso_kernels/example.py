"""Examples of operations: what the ahead-of-time check compiles, the interpreter's test runs and the benchmarks time.

Every module with an operation has a function ``examples(generation, size)``: the operation at the shapes of a step, and at
every other entry of its configuration table.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from .launch import Generation, Launch
from .operation import Operation
from .rows import QuantizedRows, Rows, new_row_scales, quantized_dtypes


@dataclass(frozen=True)
class Size:
    """How large the operands of examples are, of what type, and where they lie.

    Args:
        rows: packed rows T, a multiple of 16.
        width: the model's C, a multiple of 128; by default FLUX's.
        dtype: of floats.
        device: of all tensors.
    """

    rows: int = 64
    width: int = 3072
    dtype: torch.dtype = torch.bfloat16
    device: torch.device | str = "cpu"

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers whose mean is not zero; integers where the dtype is int8."""
        if dtype == torch.int8:
            return torch.randint(-127, 128, shape, dtype=dtype, device=self.device)
        return (torch.randn(shape, device=self.device) + 0.5).to(dtype or self.dtype)

    def unwritten(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for a result, full of what none holds."""
        if dtype is not None and dtype.itemsize == 1:
            return torch.full(shape, -77, dtype=torch.int8, device=self.device).view(dtype)
        return torch.full(shape, float("nan"), dtype=dtype or self.dtype, device=self.device)

    def endings(self, generation: Generation, rows: int, width: int) -> Iterator[tuple[str, Rows]]:
        """Memory for rows that a kernel ends in, and its name: floats, and each 8-bit type of a generation."""
        yield str(self.dtype).removeprefix("torch."), self.unwritten(rows, width)
        for dtype in quantized_dtypes(generation):
            scale = new_row_scales(rows, torch.device(self.device)).fill_(float("nan"))
            yield str(dtype).removeprefix("torch."), QuantizedRows(self.unwritten(rows, width, dtype=dtype), scale)


@dataclass(frozen=True)
class Example:
    """One call of an operation.

    Args:
        name: of the case, unique among all.
        operation: what is called.
        operands: of the call; those that it fills hold nothing.
        flops: multiplications and additions of a product; 0: it is bound by memory.
        is_hot: whether a step makes this call; else it is an entry of a table that the full-size model does not reach.
    """

    name: str
    operation: Operation
    operands: tuple[object, ...]
    flops: int = 0
    is_hot: bool = True

    @property
    def moved_bytes(self) -> int:
        """Bytes that must be moved: every operand once."""
        return sum(operand.nbytes for operand in self.operands if isinstance(operand, Tensor))

    def launch(self, generation: Generation) -> Launch:
        """Its Triton launch."""
        return self.operation.launch(generation, *self.operands)


def kernel_modules() -> list[ModuleType]:
    """Every module of the package."""
    package = importlib.import_module(__package__)
    found = pkgutil.walk_packages(package.__path__, f"{__package__}.")
    return [importlib.import_module(module.name) for module in found]


def all_examples(generation: Generation, size: Size | None = None) -> Iterator[Example]:
    """Every example of every module.

    Args:
        generation: whose types and configurations to take.
        size: of the operands.
    """
    for module in kernel_modules():
        if hasattr(module, "examples"):
            declared = cast("Callable[[Generation, Size], Iterator[Example]]", module.examples)
            yield from declared(generation, size if size is not None else Size())
