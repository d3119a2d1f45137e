"""Run a kernel where this machine can: natively on a GPU, through Triton's interpreter on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from uso_engine.verification.measure import relative_error
from uso_kernels.interpret import interpreted, interpreter_missing
from uso_kernels.operation import Operation

# The interpreter rounds neither bfloat16 nor float8 as a GPU does; those are for a GPU.
PLACES = [
    pytest.param(("cpu", torch.float32), id="interpreter-float32"),
    pytest.param(("cpu", torch.float16), id="interpreter-float16"),
    pytest.param(("cuda", torch.bfloat16), id="gpu-bfloat16", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.float32), id="gpu-float32", marks=pytest.mark.gpu),
]
HALF_PLACES = [PLACES[0], PLACES[1], PLACES[2]]


def require_interpreter() -> None:
    """Skip where Triton's interpreter cannot run at all; `test_interpret.py` says with which versions it has to."""
    reason = interpreter_missing()
    if reason is not None:
        pytest.skip(reason)


def run_kernel(operation: Operation, *operands: object) -> None:
    """Launch an operation's Triton kernel; a CPU tensor goes through the interpreter without registering anything."""
    if any(isinstance(operand, Tensor) and operand.is_cuda for operand in operands):
        operation(*operands)
        return
    require_interpreter()
    interpreted(operation)(*operands)


def poisoned(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A tensor that shows every element nobody wrote."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)
    return torch.full(shape, -77, dtype=torch.int8, device=device).view(dtype)


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Within it, memory that PyTorch is asked for without values is NaN until somebody writes it."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def drawn(*shape: int, seed: int, place: tuple[str, torch.dtype], mean: float = 0.5) -> Tensor:
    """Normal numbers with a mean that is not zero."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean
    return numbers.to(place[1]).to(place[0])


def check_error(result: Tensor, eager: Tensor, truth: Tensor) -> None:
    """At most twice the error of plain PyTorch in the same type, or a few roundings of float32; never a not-a-number."""
    limit = max(2 * relative_error(eager, truth), 2e-7)
    assert relative_error(result, truth) <= limit
